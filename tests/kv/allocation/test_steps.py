"""Bits for blocks: the least loss of all tables with as many bits, nested in the budget, within one step of it."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.errors import BudgetError
from nestling.kv import Allocation
from nestling.kv.allocation.allocate import by_rank, losses
from nestling.kv.allocation.budget import read_share
from nestling.kv.allocation.steps import MAX_GROUPS, fill, hull
from nestling.kv.allocation.table import CHOICES

ERRORS = torch.tensor([1.0, 0.36, 0.12, 0.037, 0.012, 0.005, 0.0019, 0.0005, 1e-4])  # of no bits, and of quantisers


def random_losses(seed: int, layers: int = 2, heads: int = 2, width: int = 24) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return losses(torch.rand(2, layers, heads, width, 1, generator=rng).pow(4) * ERRORS)


def by_bits(found: torch.Tensor, bits: float, width: int = 24) -> Allocation:
    steps = fill(found, width)
    return steps.required(read_share(bits / steps.most))


def lost(table: Allocation, given: torch.Tensor) -> float:
    places = torch.tensor([CHOICES.index(b) for b in table.stacked.flatten().tolist()])
    return float(given.double().flatten(0, -2)[torch.arange(len(places)), places].sum())


def test_losses_of_a_block_are_the_costs_of_its_coordinates():
    cost = torch.rand(2, 1, 1, 12, len(CHOICES) - 1, dtype=torch.float64)
    lost_by_block = losses(cost.float())
    assert lost_by_block.dtype == torch.float64
    assert lost_by_block.shape == (2, 1, 1, 2, len(CHOICES))
    torch.testing.assert_close(lost_by_block[1, 0, 0, 1, :-1], cost[1, 0, 0, 8:].sum(0))  # a last block of four
    torch.testing.assert_close(lost_by_block[0, 0, 0, 0, :-1], cost[0, 0, 0, :8].sum(0))
    assert (lost_by_block[..., -1] == 0).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 1.0))
def test_no_table_with_as_many_bits_loses_less(seed, share):
    """Against all tables of one head with two blocks of keys and one of values."""
    found = random_losses(seed, 1, 1, 16)
    found[1, :, :, 1] = 0  # the last block of values is worth nothing
    try:
        table = by_bits(found, share * 3 * 8 * 16, 16)
    except BudgetError:
        return
    best = min(
        sum(float(found[place][CHOICES.index(b)]) for place, b in zip(PLACES, bits, strict=True))
        for bits in product(CHOICES, repeat=3)
        if 8 * sum(bits) <= table.bits
    )
    assert lost(table, found) == pytest.approx(best, rel=1e-5, abs=1e-9)


PLACES = [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0)]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), heads=st.integers(1, 9), shares=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)))
def test_tables_are_nested_and_meet_their_budget(seed, heads, shares):
    found = random_losses(seed, 3, heads)
    full = found[..., 0].numel() * 8 * 16
    small, large = (by_bits(found, share * full) for share in sorted(shares))
    assert (small.stacked <= large.stacked).all()
    for table, share in ((small, min(shares)), (large, max(shares))):
        most = max(1, heads - MAX_GROUPS + 1)  # heads that move together
        assert share * full - 8 * 16 * most < table.bits <= share * full or not could_gain(table, found)


def could_gain(table: Allocation, found: torch.Tensor) -> bool:
    """Whether any block could gain from more bits."""
    return any(
        by > 0
        for block, at in zip(found.flatten(0, -2), table.stacked.flatten(), strict=True)
        for by, to, _ in hull(block.tolist())
        if to > at
    )


def test_heads_of_a_layer_share_tables_where_there_are_many():
    found = random_losses(1, 2, 9)
    table = by_bits(found, 0.3 * found[..., 0].numel() * 8 * 16)
    assert all(len(table.groups(row)) <= MAX_GROUPS for row in range(2))
    assert sorted(h for heads, _ in table.groups(0) for h in heads) == list(range(9))


def test_bad_losses_and_budgets_are_refused():
    found = random_losses(0)
    with pytest.raises(BudgetError, match=r"below the smallest possible, 0\.0026"):
        by_bits(found, 7)
    with pytest.raises(BudgetError, match="finite"):
        by_bits(found * torch.nan, 1000)


def test_what_is_worth_nothing_comes_last():
    """At the whole budget the cache is full; before, no bits go where nothing is lost."""
    found = random_losses(0)
    found[0, 1, 0] = 0
    steps = fill(found, 24)
    full = steps.at(1)
    assert (full.stacked == 16).all() and full.bits == steps.most == 16 * 2 * 2 * 2 * 24
    most = steps.table(steps.most - 3 * 8 * 16)
    assert (most[0, 1, 0] == 0).all() and most.sum() == 16 * (2 * 2 * 2 * 3 - 3)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31), width=st.sampled_from([1, 4, 7, 12, 19]), share=st.floats(0.3, 1), ranks=st.booleans()
)
def test_a_small_last_block_costs_what_it_takes(seed, width, share, ranks):
    """At 16 bits its coordinates, in codes those of a whole block: no width costs more than 16 bits would."""
    found = random_losses(seed, width=width)
    steps = fill(by_rank(found[..., 0], width) if ranks else found, width)
    assert steps.most == 16 * 2 * 2 * 2 * width
    table = steps.at(share)
    if table is None:
        return
    assert table.bits <= share * steps.most + 1e-6
    last = table.stacked[..., -1]
    assert (last[last < 16] * 8 < 16 * (width % 8 or 8)).all()
    if ranks:
        assert (table.stacked.diff(dim=-1) <= 0).all() and not table.quantised
