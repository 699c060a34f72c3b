"""A live cache made smaller in place: trailing coordinates and low bits are dropped, nothing is read again.

Codes are nested, so what is left is what a cache of the smaller budget would have stored of the same tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.kv.buffer import Buffer
from nestling.kv.groups import RankGroup
from nestling.kv.pack import BLOCK
from nestling.kv.packed import PackedRows
from nestling.kv.quantise import narrowed


def take(new: RankGroup, old: Sequence[RankGroup], dtype: torch.dtype) -> None:
    """Fill an empty group with what groups of the same layer hold, as far as it keeps it."""
    for side in (0, 1):
        heads = [_find(old, head) for head in new.heads]
        if heads[0][0].encode[side] is None:
            states = torch.stack([group.rows[side].coordinates(dtype)[place] for group, place in heads])
            new.append_side(side, states, dtype)
            continue
        rows, layout = new.rows[side], new.layouts[side]
        if isinstance(rows, Buffer):
            rows.append(torch.stack([_plain(*head, side, layout.plain) for head in heads]), dtype)
        else:
            if rows.plain is not None:
                rows.plain.append(torch.stack([_plain(*head, side, layout.plain) for head in heads]), dtype)
            rows.append_codes(torch.stack([_codes(*head, side, rows, i) for i, head in enumerate(heads)]))


def _find(groups: Sequence[RankGroup], head: int) -> tuple[RankGroup, int]:
    """The group that holds a head, and the head's place there."""
    group = next(group for group in groups if head in group.heads)
    return group, group.heads.index(head)


def _plain(group: RankGroup, place: int, side: int, wanted: Sequence[int]) -> Tensor:
    """Coordinates of a head that were stored as they are, ``[B, w, T]``."""
    rows, held = group.rows[side], group.layouts[side].plain
    data = rows if isinstance(rows, Buffer) else rows.plain
    if data is None or not wanted:
        some = rows if isinstance(rows, Buffer) else rows.codes
        return some.view()[place, :, :0]
    return data.view()[place][:, [held.index(i) for i in wanted]]


def _codes(group: RankGroup, place: int, side: int, rows: PackedRows, head: int) -> Tensor:
    """Codes of a head as ``rows`` keep them at the place ``head``, ``[B, w, T]``."""
    held, layout, found = group.rows[side], group.layouts[side], []
    for number, (block, bits) in enumerate(zip(rows.layout.blocks, rows.layout.widths, strict=True)):
        if isinstance(held, PackedRows) and block in layout.blocks:
            found.append(narrowed(*held.code_of(place, block), bits))
        else:
            inside = [i for i in range(block * BLOCK, (block + 1) * BLOCK) if i in layout.plain]
            z = _plain(group, place, side, inside)
            z = torch.nn.functional.pad(z, (0, 0, 0, BLOCK - len(inside)))
            found.append(rows.quantised(z, head, number))
    return torch.cat(found, 1)
