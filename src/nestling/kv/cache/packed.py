"""Coordinates at 1 to 16 bits each: quantised about their means, packed, and read block by block of tokens.

Nothing is expanded as a whole, and nothing is quantised twice: codes are appended once, and attention unpacks some
hundred tokens at a time. Scales are static and folded into queries and outputs, so that what is unpacked are integers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from nestling.kv.cache.buffer import Buffer
from nestling.kv.cache.matmul import cast, product
from nestling.kv.integration.modes import traced, without_gradient
from nestling.kv.quantisation import cpu as kernels
from nestling.kv.quantisation import quantiser as quantise
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK, coordinates_of, pack, unpack

TOKENS = 1024  # unpacked at a time
ALL = slice(None)


@dataclass(frozen=True, order=True, slots=True)
class Layout:
    """Which coordinates of a head are kept, and how.

    Attributes:
        plain: coordinates that are stored as they are, in the precision of the cache.
        widths: bits of the blocks of eight coordinates that are coded, in falling order.
        blocks: which blocks those are.
    """

    plain: tuple[int, ...]
    widths: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    @classmethod
    def of(cls, bits: Sequence[int], width: int) -> "Layout":
        """Of the bits of each block of a head of ``width`` coordinates: 0, one of `quantise.WIDTHS`, or 16."""
        plain = [i for i in range(width) if bits[i // COORDINATES_PER_BLOCK] == 16]
        coded = sorted((b for b in range(len(bits)) if 0 < bits[b] < 16), key=lambda b: -bits[b])
        return cls(tuple(plain), tuple(bits[b] for b in coded), tuple(coded))

    @property
    def coded(self) -> list[int]:
        """Coordinates that are coded, eight a block: those of a last block may lie beyond the width of the head."""
        return coordinates_of(self.blocks)


def runs_of(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of blocks of equal widths: bits, the first coordinate, and how many."""
    runs, start = [], 0
    for bits, run in groupby(widths):
        count = COORDINATES_PER_BLOCK * len(list(run))
        runs.append((bits, start, count))
        start += count
    return runs


@dataclass(frozen=True, eq=False, slots=True)
class Coding:
    """How the coded coordinates of some heads are quantised, fp32, in the order of a layout.

    Attributes:
        centre, step: ``[h, 1, w, 1]``, see `quantise`.
        scale: ``[h, 1, w]``, the value of one code more.
        offset: ``[w]``, what codes are counted from.
    """

    centre: Tensor
    step: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, layout: Layout, centre: Tensor, step: Tensor) -> "Coding":
        """From centres and steps ``[h, w]``."""
        runs = runs_of(layout.widths)
        scale = torch.cat([quantise.scale(step[:, a : a + n], bits) for bits, a, n in runs], -1)[:, None]
        offset = torch.cat([step.new_full((n,), quantise.offset(bits)) for bits, _, n in runs])
        return cls(centre[:, None, :, None], step[:, None, :, None], scale, offset)

    def __deepcopy__(self, memo: dict) -> "Coding":
        return self


class PackedRows:
    """Coordinates of tokens by a `Layout`; to a rank group what `Buffer` is where nothing is coded.

    Args:
        until: see `nestling.kv.cache.buffer.room`.
    """

    dim = 3

    def __init__(self, layout: Layout, coding: Coding, until: int = 0):
        self.layout, self.coding, self.rank = layout, coding, len(layout.plain)
        self.plain = Buffer(until) if layout.plain else None
        self.codes = Buffer(until)
        self.traced = False  # whether a graph ended in the codes

    def __getstate__(self) -> dict:
        return {**self.__dict__, "coding": None}  # which the layer has

    @property
    def length(self) -> int:
        return self.codes.length

    def append(self, new: Tensor, dtype: torch.dtype) -> None:
        """Add coordinates ``[h, B, w, t]``: the plain ones, then the coded ones. They are rounded to ``dtype`` first,
        so that codes do not depend on how wide a coordinate was before (see `NestedCache.shrink`)."""
        new = new.to(dtype)
        self.traced = traced(new) or (self.traced and torch.is_grad_enabled())
        self.append_packed(new[:, :, : self.rank], self.quantised(new[:, :, self.rank :]), dtype)

    def append_packed(self, plain: Tensor, packed: Tensor, dtype: torch.dtype) -> None:
        """Add coordinates that are stored as they are, ``[h, B, rank, t]``, and the bytes of the others."""
        if self.plain is not None:
            self.plain.append(plain, dtype)
        self.codes.append(packed, torch.uint8)

    def quantised(self, values: Tensor, heads: slice = ALL, numbers: Sequence[int] | None = None) -> Tensor:
        """The bytes ``[h, B, rows, t]`` of coordinates ``[h, B, w, t]`` of some heads.

        Args:
            numbers: which of the coded blocks they are, rising; by default all.
        """
        widths, centre, step = self.layout.widths, self.coding.centre[heads], self.coding.step[heads]
        if numbers is not None:
            widths = tuple(widths[number] for number in numbers)
            rows = coordinates_of(numbers)
            centre, step = centre[:, :, rows], step[:, :, rows]
        z = values.detach().float() - centre
        codes = [quantise.quantise(z[:, :, a : a + n], step[:, :, a : a + n], bits) for bits, a, n in runs_of(widths)]
        return pack(torch.cat(codes, 2), widths)

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Codes of some tokens at a time: start, count, ``[h * B, w, count]``."""
        rows = self.codes.flat()
        for start in range(0, self.length, TOKENS):
            count = min(TOKENS, self.length - start)
            yield start, count, unpack(rows.narrow(2, start, count), self.layout.widths).to(dtype)

    def _of_batch(self, scale: Tensor, heads: int) -> Tensor:
        """``[h, 1, w]`` to ``[h * B, 1, w]``."""
        return scale if heads == len(scale) else scale.repeat_interleave(heads // len(scale), 0)

    def score(self, rows: Tensor, into: Tensor, scaling: float) -> None:
        """``scaling * rows @ coordinates``: of ``[h * B, n, w]`` into ``[h * B, n, length]``."""
        scaled = rows[..., self.rank :] * (cast(self._of_batch(self.coding.scale, len(rows)), rows.dtype) * scaling)
        shift = scaled @ cast(self.coding.offset, rows.dtype)[:, None]
        if self.plain is not None:
            self.plain.score(rows[..., : self.rank], into, scaling)
        if fused := kernels.products(self.codes.flat(), rows.dtype):
            data = self.codes.whole()
            return fused.score(data, self.length, self.layout.widths, scaled, shift, into, self.plain is not None)
        for start, count, codes in self._blocks(rows.dtype):
            part, logits = into.narrow(2, start, count), product(scaled, codes).sub_(shift)
            if self.plain is None:
                part.copy_(logits)
            else:
                part.add_(logits)

    def weighted(self, weight: Tensor) -> Tensor:
        """The sums of coordinates with weights ``[h * B, n, length]``: ``[h * B, n, w]``."""
        total = weight.sum(-1, keepdim=True)
        out = -total * cast(self.coding.offset, weight.dtype)
        if fused := kernels.products(self.codes.flat(), weight.dtype):
            out += fused.weighted(self.codes.whole(), self.length, self.layout.widths, weight)
        else:
            for start, count, codes in self._blocks(weight.dtype):
                out += product(weight.narrow(2, start, count), codes.mT)
        out *= cast(self._of_batch(self.coding.scale, len(weight)), weight.dtype)
        return out if self.plain is None else torch.cat((self.plain.weighted(weight), out), -1)

    def coordinates(self, dtype: torch.dtype) -> Tensor:
        """What is held, ``[h, B, length, w]``; coded ones about their means."""
        values = unpack(self.codes.view(), self.layout.widths).to(dtype).mT
        values = (values - self.coding.offset.to(dtype)) * self.coding.scale[:, None].to(dtype)
        if self.traced and torch.is_grad_enabled():
            values = without_gradient(values)
        return values if self.plain is None else torch.cat((self.plain.coordinates(dtype), values), -1)

    def _parts(self) -> list[Buffer]:
        return [self.codes] if self.plain is None else [self.plain, self.codes]

    def select(self, places: Tensor) -> None:
        for part in self._parts():
            part.select(places)

    def crop(self, remove: int) -> None:
        for part in self._parts():
            part.crop(remove)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self._parts():
            part.apply(change)

    def reset(self) -> None:
        self.traced = False
        for part in self._parts():
            part.reset()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts())
