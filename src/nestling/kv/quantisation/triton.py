"""The products of kernels.py for GPUs, in Triton: packed codes are unpacked in registers and nowhere else.

A packed row is a byte a token; a byte holds numbers of one field (see pack.py). Both products are linear in them, so
that a code of three bits is two numbers, one of which counts double.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK, FIELDS, places

TILE = 256  # tokens at a time


# The numbers of a byte are taken one after the other: sums over the middle one of three axes were too large as
# Triton 3.6 compiled them.


@triton.jit
def _scored(sums, rows, stride, by, n, per_query, first, last, token, valid, FIELD: tl.constexpr):
    for row in range(first, last):
        byte = tl.load(rows + row * stride + token, mask=valid, other=0).to(tl.int32)
        for i in tl.static_range(8 // FIELD):
            weight = tl.load(by + n * per_query + row * 8 + i)
            number = ((byte >> (FIELD * i)) & ((1 << FIELD) - 1)).to(tl.float32)
            sums += weight[:, None] * number[None, :]
    return sums


@triton.jit
def _score(
    rows, stride, count, by, shift, queries, e8, e4, e2, tokens, into, of_group, of_query,
    ADD: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``by @ numbers - shift`` of a group and a tile of tokens."""
    group, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid, n = token < tokens, tl.arange(0, QUERIES)
    rows += group * count * stride
    by += group * QUERIES * count * 8
    per_query = count * 8
    sums = tl.zeros((QUERIES, TILE), tl.float32)
    sums = _scored(sums, rows, stride, by, n, per_query, 0, e8, token, valid, 8)
    sums = _scored(sums, rows, stride, by, n, per_query, e8, e4, token, valid, 4)
    sums = _scored(sums, rows, stride, by, n, per_query, e4, e2, token, valid, 2)
    sums = _scored(sums, rows, stride, by, n, per_query, e2, count, token, valid, 1)
    inside = (n < queries)[:, None] & valid[None, :]
    sums -= tl.load(shift + group * queries + n, mask=n < queries, other=0.0)[:, None]
    place = into + group * of_group + n[:, None] * of_query + token[None, :]
    if ADD:
        sums += tl.load(place, mask=inside, other=0.0)
    tl.store(place, sums, mask=inside)


@triton.jit
def _weighted(
    rows, stride, count, weight, of_group, of_query, queries, e8, e4, e2, tokens, out,
    QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``weight @ numbers^T`` of a group, a packed row and a place in its bytes."""
    group, row, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    field = tl.where(row < e8, 8, tl.where(row < e4, 4, tl.where(row < e2, 2, 1)))
    n = tl.arange(0, QUERIES)
    rows += group * count * stride + row * stride
    weight += group * of_group
    if i * field < 8:
        sums = tl.zeros((QUERIES, TILE), tl.float32)
        for start in range(0, tokens, TILE):
            token = start + tl.arange(0, TILE)
            valid = token < tokens
            inside = (n < queries)[:, None] & valid[None, :]
            share = tl.load(weight + n[:, None] * of_query + token[None, :], mask=inside, other=0.0).to(tl.float32)
            byte = tl.load(rows + token, mask=valid, other=0).to(tl.int32)
            number = ((byte >> (field * i)) & ((1 << field) - 1)).to(tl.float32)
            sums += share * number[None, :]
        tl.store(out + ((group * count + row) * QUERIES + n) * 8 + i, tl.sum(sums, 1))


def score(rows: Tensor, tokens: int, widths: tuple[int, ...], query: Tensor, shift: Tensor, into: Tensor, add: bool):
    """As `nestling.kv.quantisation.cpu.score`, in fp32 whatever is given."""
    assert into.stride(2) == 1, "not as the kernel writes"
    (groups, queries, _), (ends, coordinate, unit) = query.shape, _places(widths, query.device)
    padded = max(2, triton.next_power_of_2(queries))
    by = query.new_zeros(groups, padded, *coordinate.shape, dtype=torch.float32)
    by[:, :queries] = query.float()[..., coordinate] * unit
    _score[(groups, triton.cdiv(tokens, TILE))](
        rows, rows.stride(1), rows.shape[1], by, shift.float().contiguous(), queries, *ends, tokens, into,
        into.stride(0), into.stride(1), ADD=add, QUERIES=padded, TILE=TILE,
    )  # fmt: skip


def weighted(rows: Tensor, tokens: int, widths: tuple[int, ...], weight: Tensor) -> Tensor:
    """As `nestling.kv.quantisation.cpu.weighted`, summed in fp32."""
    weight = weight if weight.stride(2) == 1 else weight.contiguous()
    (groups, queries, _), (ends, coordinate, unit) = weight.shape, _places(widths, weight.device)
    padded = max(2, triton.next_power_of_2(queries))
    sums = weight.new_zeros(groups, len(coordinate), padded, COORDINATES_PER_BLOCK, dtype=torch.float32)
    _weighted[(groups, len(coordinate), COORDINATES_PER_BLOCK)](
        rows, rows.stride(1), rows.shape[1], weight, weight.stride(0), weight.stride(1), queries, *ends, tokens, sums,
        QUERIES=padded, TILE=TILE,
    )  # fmt: skip
    numbers = (sums[:, :, :queries] * unit[:, None]).permute(0, 2, 1, 3).flatten(2)
    out = numbers.new_zeros(groups, queries, COORDINATES_PER_BLOCK * len(widths))
    return out.index_add_(2, coordinate.flatten(), numbers).to(weight.dtype)


@cache
def _places(widths: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Ends of the rows of 8, 4 and 2 bits; coordinates and units ``[rows, 8]`` of the numbers in a row (else 0)."""
    fields, coordinates, units = places(widths)
    rows = torch.zeros(2, len(fields), COORDINATES_PER_BLOCK, dtype=torch.int64)
    for row, pair in enumerate(zip(coordinates, units, strict=True)):
        rows[:, row, : len(pair[0])] = torch.tensor(pair)
    ends = tuple(sum(field >= least for field in fields) for least in FIELDS[:-1])
    return ends, rows[0].to(device), rows[1].to(device, torch.float32)
