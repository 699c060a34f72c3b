"""The compiled attention over pages against one written in torch, request by request. vLLM is not needed."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nestling.errors import KernelError
from nestling.integrations.vllm import kernels
from nestling.kv.cache import drift
from nestling.kv.cache.bases import LayerBases, SideBasis
from nestling.kv.cache.drift import span_of
from nestling.kv.cache.rule import coded

SPANS = 4
SINKS, WINDOW = 4, 24


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        kernels.compiled()
    except KernelError as error:
        pytest.skip(str(error))


@dataclass
class Case:
    """A layer, texts of some lengths, and pages that are scattered over a pool."""

    heads: kernels.Heads
    bases: LayerBases | None
    keys: list[Tensor]  # of each text, [tokens, heads, width]
    values: list[Tensor]
    pages: list[Tensor]
    tables: list[Tensor]

    @property
    def layer(self) -> kernels.PagedLayer:
        return kernels.PagedLayer(self.heads, self.bases, SINKS, WINDOW)

    def slots(self, kind: int, text: int, first: int, last: int) -> Tensor:
        size, table = self.pages[kind].shape[2], self.tables[kind][text].long()
        places = torch.arange(first, last)
        return table[places // size] * size + places % size

    def read(self, parts: list[tuple[int, int, int]], queries: Tensor) -> Tensor:
        """Store and attend to tokens first to last of some texts, in one step."""
        starts = torch.tensor([0, *(last - first for _, first, last in parts)]).cumsum(0).to(torch.int32)
        new = [torch.cat([side[text][first:last] for text, first, last in parts]) for side in (self.keys, self.values)]
        slots = [torch.cat([self.slots(kind, *part) for part in parts]) for kind in range(len(self.pages))]
        stored = list(zip(self.pages, slots, strict=True))
        self.layer.store(*new, stored[0], stored[1] if len(stored) > 1 else None)
        rows = [text for text, _, _ in parts]
        pages = [(data, table[rows]) for data, table in zip(self.pages, self.tables, strict=True)]
        out = torch.full_like(queries, math.nan)
        lengths = torch.tensor([last for _, _, last in parts], dtype=torch.int32)
        self.layer.attend(queries, out, pages, starts, lengths)
        return out


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr(drift, "SPAN", 25)  # texts lie in all spans, and beyond


def bases_of(heads: kernels.Heads, rank: int, seed: int = 0) -> LayerBases:
    rng = torch.Generator().manual_seed(seed)
    sides, biases = [], []
    for _ in range(2):
        encode = torch.linalg.qr(torch.randn(heads.count, heads.width, heads.width, generator=rng))[0]
        encode = encode * (0.5 + torch.rand(heads.width, generator=rng))
        decode = torch.linalg.inv(encode.double().mT).float()
        sides.append(SideBasis(encode[:, :rank].contiguous(), decode[:, :rank].contiguous()))
        biases.append(torch.randn(heads.count, 1, heads.width, generator=rng))
    drift = torch.randn(heads.count, SPANS, heads.width, generator=rng)
    return LayerBases([sides], biases, heads.width, torch.device("cpu"), drift=drift)


def case_of(dtype=torch.float32, rank: int = 8, heads=(2, 3, 32), sizes=(32, 16), lengths=(90, 7, 200)) -> Case:
    rng = torch.Generator().manual_seed(1)
    shape = kernels.Heads(*heads, scale=0.3, dtype=dtype)
    bases = bases_of(shape, rank) if rank < shape.width else None
    states = [[torch.randn(n, shape.count, shape.width, generator=rng).to(dtype) for n in lengths] for _ in range(2)]
    pages, tables = [], []
    for size, width in list(zip(sizes, (rank, shape.width), strict=True))[: 1 if bases is None else 2]:
        need = [-(-n // size) for n in lengths]
        order = torch.randperm(sum(need), generator=rng).to(torch.int32) + 1
        tables.append(torch.zeros(len(lengths), max(need), dtype=torch.int32))
        for text, count in enumerate(need):
            tables[-1][text, :count], order = order[:count], order[count:]
        raw = torch.zeros(sum(need) + 1, 3, shape.count, size, 2 * width, dtype=dtype)  # of three layers, side by side
        pages.append(raw[:, 1])
    return Case(shape, bases, *states, pages, tables)


def expected(case: Case, text: int, query: Tensor, place: int) -> Tensor:
    """Of one query ``[heads * group, width]`` at a place of a text, in fp64."""
    keys, values = (side[text][: place + 1].double() for side in (case.keys, case.values))
    if case.bases is not None:
        ((key_basis, value_basis),) = case.bases.sides
        border = SINKS + coded(place + 1, SINKS, WINDOW)
        read = []
        spans = span_of((torch.arange(place + 1) - SINKS).clamp(min=0), SPANS)
        moves = case.bases.drift[:, spans].transpose(0, 1).double(), 0.0  # of keys alone
        sides = zip((keys, values), (key_basis, value_basis), case.bases.biases, moves, strict=True)
        for states, basis, bias, move in sides:
            coordinates = torch.einsum("thd,hrd->thr", states, basis.encode.double()).to(case.heads.dtype).double()
            decoded = torch.einsum("thr,hrd->thd", coordinates, basis.decode.double()) + bias[:, 0].double() + move
            read.append(torch.cat((states[:SINKS], decoded[SINKS:border], states[max(border, SINKS) :])))
        keys, values = read
    query = query.double().view(case.heads.count, case.heads.group, -1)
    weight = (torch.einsum("hgd,thd->hgt", query, keys) * case.heads.scale).softmax(-1)
    return torch.einsum("hgt,thd->hgd", weight, values).flatten(0, 1)


def check(case: Case, parts: list[tuple[int, int, int]], tolerance: float) -> None:
    count, heads = sum(last - first for _, first, last in parts), case.heads
    rng = torch.Generator().manual_seed(2)
    queries = torch.randn(count, heads.count * heads.group, heads.width, generator=rng).to(heads.dtype)
    out = case.read(parts, queries).double()
    places = [(text, place) for text, first, last in parts for place in range(first, last)]
    right = torch.stack([expected(case, *at[:1], query, at[1]) for at, query in zip(places, queries, strict=True)])
    assert torch.isfinite(out).all()
    assert float((out - right).abs().max()) <= tolerance * float(right.abs().max())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rank", [8, 24, 32])
def test_chunks_then_single_tokens_in_one_step(dtype, tolerance, rank):
    """Texts of different lengths in one step, as prefill and decode come together in vLLM."""
    case = case_of(dtype, rank)
    check(case, [(0, 0, 50), (1, 0, 6), (2, 0, 130)], tolerance)
    check(case, [(0, 50, 51), (1, 6, 7), (2, 130, 199)], tolerance)
    check(case, [(2, 199, 200), (0, 51, 90)], tolerance)


@pytest.mark.parametrize("heads", [(1, 1, 16), (2, 4, 24), (1, 9, 64), (3, 60, 8)])
def test_shapes_of_heads(heads):
    case = case_of(heads=heads, sizes=(64, 32))
    check(case, [(0, 0, 90), (2, 0, 200)], 3e-6)


@pytest.mark.parametrize("sizes", [(16, 16), (96, 48), (128, 16), (80, 80)])
def test_sizes_of_blocks(sizes):
    check(case_of(sizes=sizes), [(0, 0, 90), (1, 0, 7), (2, 0, 200)], 2e-6)


def test_threads_change_nothing():
    case, before = case_of(), torch.get_num_threads()
    queries = torch.randn(297, 6, 32, generator=torch.Generator().manual_seed(0))
    outs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(case.read([(0, 0, 90), (1, 0, 7), (2, 0, 200)], queries))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_places_that_are_none_are_left_out_and_large_logits_do_not_overflow():
    case = case_of()
    case.layer.store(case.keys[0], case.values[0], (case.pages[0], torch.full((5,), -1)), None)
    assert not case.pages[0].any()
    for text in range(3):
        case.keys[text] *= 300
    check(case, [(0, 0, 90), (1, 0, 7), (2, 0, 200)], 1e-4)
