"""Codes of 1 to 8 bits packed into bytes, eight coordinates at a time: b bits of eight coordinates are b bytes.

A width is the sum of fields of 8, 4, 2 and 1 bits, those of its binary digits (3 bits are 2 and 1). A field of f bits
of eight coordinates takes f bytes: byte j holds coordinates j, j + f, j + 2 f and so on, the first in its lowest bits.
Tokens are the last axis and are not packed with each other, so that they can be appended one by one.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

COORDINATES_PER_BLOCK = 8
FIELDS = (8, 4, 2, 1)


def coordinates_of(blocks: Iterable[int]) -> list[int]:
    """The coordinates of some blocks, in their order."""
    return [COORDINATES_PER_BLOCK * block + i for block in blocks for i in range(COORDINATES_PER_BLOCK)]


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Bytes ``[..., sum(widths), t]`` of codes ``[..., 8 * len(widths), t]`` uint8, a width for each eight.

    The fields of 8 bits of all blocks come first, then those of 4, 2 and 1.
    """
    blocks = codes.unflatten(-2, (len(widths), COORDINATES_PER_BLOCK))
    runs, start = [], 0
    for width, run in groupby(widths):
        count = len(list(run))
        runs.append((width, blocks.narrow(-3, start, count)))
        start += count
    rows = []
    for field in FIELDS:
        members = [
            run >> _below(width, field) if _below(width, field) else run for width, run in runs if width & field
        ]
        if members:
            chosen = members[0] if len(members) == 1 else torch.cat(members, -3)
            rows.append(_joined(chosen & ((1 << field) - 1) if field < 8 else chosen, field).flatten(-3, -2))
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)


def _joined(numbers: Tensor, field: int) -> Tensor:
    """Bytes ``[..., field, t]`` of eight numbers of ``field`` bits, ``[..., 8, t]``: halves are joined."""
    while (half := numbers.shape[-2] // 2) >= field:
        numbers = numbers.narrow(-2, 0, half) | numbers.narrow(-2, half, half) << half
    return numbers


def unpack(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """The inverse: codes ``[..., 8 * len(widths), t]``; equal widths must lie together."""
    fields, start = {}, 0
    for field in FIELDS:
        if count := sum(bool(width & field) for width in widths):
            packed = rows.narrow(-2, start, field * count).unflatten(-2, (count, field))
            mask = (1 << field) - 1
            parts = [(packed >> shift) & mask for shift in range(0, 8, field)] if field < 8 else [packed]
            fields[field] = torch.cat(parts, -2)
            start += field * count
    taken = dict.fromkeys(FIELDS, 0)
    codes = []
    for width, run in groupby(widths):
        count, code = len(list(run)), torch.zeros((), dtype=torch.uint8, device=rows.device)
        for field in [f for f in FIELDS if width & f]:
            code = code | fields[field].narrow(-3, taken[field], count) << _below(width, field)
            taken[field] += count
        codes.append(code.flatten(-3, -2))
    return torch.cat(codes, -2)


def rows_of(widths: Sequence[int]) -> list[dict[int, range]]:
    """For each block of coordinates and each field of its width, which of the packed rows it has."""
    rows: list[dict[int, range]] = [{} for _ in widths]
    start = 0
    for field in FIELDS:
        for own, width in zip(rows, widths, strict=True):
            if width & field:
                own[field] = range(start, start + field)
                start += field
    return rows


def in_order(blocks: Sequence[dict[int, range]]) -> list[int]:
    """Rows of some blocks, each as from `rows_of`, in the order that these blocks alone would be packed in."""
    return [row for field in FIELDS for own in blocks for row in own.get(field, ())]


def places(widths: Sequence[int]) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """What each byte of a token holds: its field, and of each number in it the coordinate and what its ones count."""
    fields, coordinates, units = [], [], []
    for field in FIELDS:
        for block, width in enumerate(widths):
            for row in range(field if width & field else 0):
                fields.append(field)
                coordinates.append(coordinates_of([block])[row::field])
                units.append([1 << _below(width, field)] * len(coordinates[-1]))
    return fields, coordinates, units


def _below(width: int, field: int) -> int:
    """Bits of a width that are lower than those of one of its fields."""
    return width & (field - 1)
