"""A live cache made smaller in place: trailing coordinates and low bits are dropped, nothing is read again.

Codes are nested, so what is left is what a cache of the smaller budget would have stored of the same tokens.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from nestling.kv.cache.buffer import Buffer
from nestling.kv.cache.groups import RankGroup
from nestling.kv.cache.packed import PackedRows
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK, coordinates_of, in_order, pack, rows_of, unpack
from nestling.kv.quantisation.quantiser import narrowed

NOTHING = torch.empty(0)


def copy_truncated(new: Sequence[RankGroup], old: Sequence[RankGroup], dtype: torch.dtype) -> None:
    """Fill empty groups with what other groups of the same layer hold, as far as they keep it."""
    if not old[0].length:
        return
    for side in (0, 1):
        sources = [Held(group, side) for group in old]
        for group in new:
            if not any(group.rows[side] is source.rows for source in sources):
                _copy_side(group, side, sources, dtype)


class Held:
    """What a group holds of keys (side 0) or values (side 1)."""

    def __init__(self, group: RankGroup, side: int):
        self.heads, self.layout, self.rows = group.heads, group.layouts[side], group.rows[side]
        self.whole = group.bases[side].encode is None  # keys or values as they were
        self.place = {coordinate: place for place, coordinate in enumerate(self.layout.plain)}
        self.bits = dict(zip(self.layout.blocks, self.layout.widths, strict=True))
        self.bytes = dict(zip(self.layout.blocks, rows_of(self.layout.widths), strict=True))

    def coordinates(self, places: list[int], wanted: Sequence[int]) -> Tensor:
        """Coordinates of some heads that are stored as they are, ``[h, B, w, T]``: zero beyond the heads' width."""
        plain = self.rows if isinstance(self.rows, Buffer) else self.rows.plain
        if plain is None:
            assert not wanted and isinstance(self.rows, PackedRows)
            return self.rows.codes.view()[: len(places), :, :0]
        rows = [self.place[i] for i in wanted if i in self.place]
        kept, missing = _rows(plain.view(), places, rows), len(wanted) - len(rows)
        return torch.nn.functional.pad(kept, (0, 0, 0, missing)) if missing else kept

    def packed(self, places: list[int], blocks: Sequence[int]) -> Tensor:
        """The bytes of some coded blocks of some heads, ``[h, B, rows, T]``."""
        assert isinstance(self.rows, PackedRows)
        return _rows(self.rows.codes.view(), places, in_order([self.bytes[block] for block in blocks]))

    def narrowed(self, places: list[int], blocks: Sequence[int], widths: Sequence[int]) -> Tensor:
        """The same at fewer bits; blocks whose bits are equal, before and after, must lie together."""
        widths_before = [self.bits[block] for block in blocks]
        codes, start, runs = unpack(self.packed(places, blocks), widths_before), 0, []
        for (bits, fewer), run in groupby(zip(widths_before, widths, strict=True)):
            count = COORDINATES_PER_BLOCK * len(list(run))
            runs.append(narrowed(codes.narrow(2, start, count), bits, fewer))
            start += count
        return pack(torch.cat(runs, 2), widths)


def _copy_side(new: RankGroup, side: int, stored: Sequence[Held], dtype: torch.dtype) -> None:
    """One side of `copy_truncated`, in runs of heads that come from one group."""
    sources = [next(source for source in stored if head in source.heads) for head in new.heads]
    rows, parts = new.rows[side], []
    for source, run in groupby(range(len(sources)), key=lambda i: sources[i]):
        slots = list(run)
        places, own = [source.heads.index(new.heads[i]) for i in slots], slice(slots[0], slots[-1] + 1)
        if source.whole:
            parts.append(_of_states(new, side, source.rows.coordinates(dtype)[places], own, dtype))
        else:
            parts.append(_of_coordinates(new, side, source, places, own))
    plain, packed = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True))
    if isinstance(rows, PackedRows):
        rows.append_packed(plain, packed, dtype)
    else:
        rows.append(plain, dtype)


Part = tuple[
    Tensor, Tensor
]  # of some heads: what is stored as it is, as a buffer takes it; and bytes, if there are any


def _of_states(new: RankGroup, side: int, states: Tensor, slots: slice, dtype: torch.dtype) -> Part:
    """What a group keeps of keys or values ``[h, B, T, D]`` of the heads at some of its slots."""
    rows = new.rows[side]
    if new.bases[side].encode is None:
        return (states if rows.dim == 2 else states.mT), NOTHING
    coordinates = new.coordinates(side, states, slots).to(dtype)
    if isinstance(rows, Buffer):
        return coordinates, NOTHING
    return coordinates[:, :, : rows.rank], rows.quantised(coordinates[:, :, rows.rank :], slots)


def _of_coordinates(new: RankGroup, side: int, source: Held, places: list[int], slots: slice) -> Part:
    """What a group keeps of what another holds of the heads at some places."""
    rows, layout = new.rows[side], new.layouts[side]
    plain = source.coordinates(places, layout.plain)
    if isinstance(rows, Buffer):
        return plain, NOTHING
    numbers = {block: number for number, block in enumerate(layout.blocks)}
    widths = dict(zip(layout.blocks, layout.widths, strict=True))
    kept = [block for block in layout.blocks if source.bits.get(block) == widths[block]]
    fewer = [block for block in layout.blocks if source.bits.get(block, 0) > widths[block]]
    fewer.sort(key=lambda block: (-source.bits[block], -widths[block]))
    coded = [block for block in layout.blocks if block not in source.bits]
    parts = []
    if kept:
        parts.append((kept, source.packed(places, kept)))
    if fewer:
        parts.append((fewer, source.narrowed(places, fewer, [widths[block] for block in fewer])))
    if coded:
        values = source.coordinates(places, coordinates_of(coded))
        parts.append((coded, rows.quantised(values, slots, [numbers[block] for block in coded])))
    own = rows_of(layout.widths)
    order = torch.tensor([row for blocks, _ in parts for row in in_order([own[numbers[block]] for block in blocks])])
    packed = parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts], 2)
    return plain, packed.index_select(2, order.argsort().to(packed.device))


def _rows(tensor: Tensor, places: list[int], rows: list[int]) -> Tensor:
    """``tensor[places][:, :, rows]`` of ``[h, B, w, T]``: a view where both are ranges."""
    for dim, chosen in ((0, places), (2, rows)):
        start = chosen[0] if chosen else 0
        if chosen == list(range(start, start + len(chosen))):
            tensor = tensor.narrow(dim, start, len(chosen))
        else:
            tensor = tensor.index_select(dim, torch.tensor(chosen, device=tensor.device))
    return tensor
