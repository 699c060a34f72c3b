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
        sources = [_find(old, head) for head in new.heads]
        rows = new.rows[side]
        if new.encode[side] is None:
            states = torch.stack([group.rows[side].coordinates(dtype)[place] for group, place in sources])
            new.append_side(side, states, dtype)
            continue
        heads = [_coordinates(new, i, side, *source, dtype) for i, source in enumerate(sources)]
        if isinstance(rows, Buffer):
            rows.append(torch.stack([plain for plain, _ in heads]), dtype)
            continue
        if rows.plain is not None:
            rows.plain.append(torch.stack([plain for plain, _ in heads]), dtype)
        coded = [
            torch.cat([_code(rows, i, number, *block) for number, block in enumerate(blocks)], 1)
            for i, (_, blocks) in enumerate(heads)
        ]
        rows.append_codes(torch.stack(coded))


def _find(groups: Sequence[RankGroup], head: int) -> tuple[RankGroup, int]:
    """The group that holds a head, and the head's place there."""
    group = next(group for group in groups if head in group.heads)
    return group, group.heads.index(head)


def _coordinates(
    new: RankGroup, head: int, side: int, group: RankGroup, place: int, dtype: torch.dtype
) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """What a head keeps of what a group holds of it: coordinates that are stored as they are ``[B, w, T]``, and for
    each coded block codes and their bits, or coordinates and 16, ``[B, 8, T]``."""
    layout, held, rows = new.layouts[side], group.layouts[side], group.rows[side]
    count = len(layout.plain)
    if group.encode[side] is None:  # keys or values as they were
        encode = new.encode[side]
        assert encode is not None
        z = (encode[head] @ rows.coordinates(encode.dtype)[place].mT).to(dtype)
        blocks = [z[:, i : i + BLOCK] for i in range(count, z.shape[1], BLOCK)]
        return z[:, :count], [(block, 16) for block in blocks]
    plain = rows if isinstance(rows, Buffer) else rows.plain
    stored = plain.view()[place] if plain is not None else rows.coordinates(dtype)[place].mT[:, :0]
    found: list[tuple[Tensor, int]] = []
    for block in layout.blocks:
        if isinstance(rows, PackedRows) and block in held.blocks:
            found.append(rows.code_of(place, block))
        else:
            inside = [held.plain.index(i) for i in range(block * BLOCK, (block + 1) * BLOCK) if i in held.plain]
            missing = (0, 0, 0, BLOCK - len(inside))
            found.append((torch.nn.functional.pad(stored[:, inside], missing), 16))
    return stored[:, [held.plain.index(i) for i in layout.plain]], found


def _code(rows: PackedRows, head: int, number: int, values: Tensor, bits: int) -> Tensor:
    """The codes ``[B, 8, T]`` that the coded block of that number has, of codes of ``bits`` or of coordinates."""
    if bits == 16:
        return rows.quantised(values, head, number)
    return narrowed(values, bits, rows.layout.widths[number])
