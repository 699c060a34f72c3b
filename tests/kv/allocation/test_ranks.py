"""Budgets: met from below, optimal, monotone, and refused with a reason where they cannot be met."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.errors import BudgetError
from nestling.kv.allocation.ranks import (
    MAX_GROUPS,
    STEP,
    RankTable,
    blended,
    by_drop_cost,
    by_gains,
    drop_cost_gains,
    elements_per_token,
    uniform,
)


def drop_costs(layers: int, heads: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy decaying drop costs whose sizes differ between heads, as calibration measures them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(2, layers, heads, 1, generator=generator) * 3
    noise = torch.rand(2, layers, heads, width, generator=generator) + 0.5
    key, value = scale * noise * torch.exp(-scale * torch.arange(width) / 8)
    return key, value


def allocate(method: str, layers: int, heads: int, width: int, elements: float, seed: int = 0) -> RankTable:
    if method == "uniform":
        return uniform(layers, heads, width, elements)
    return by_drop_cost(*drop_costs(layers, heads, width, seed), elements)


def smallest(layers: int, heads: int, width: int) -> int:
    return 2 * layers * heads * min(STEP, width)


@st.composite
def budgets(draw, heads: tuple[int, int] = (1, 4), widths: tuple[int, ...] = (4, 8, 12, 16, 24, 33, 64)):
    shape = draw(st.integers(1, 5)), draw(st.integers(*heads)), draw(st.sampled_from(widths))
    low, high = smallest(*shape), 2 * shape[0] * shape[1] * shape[2]
    return *shape, draw(st.floats(low, high) | st.integers(low, high) | st.just(high))


@pytest.mark.parametrize("method", ["uniform", "energy"])
@given(budgets(), st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_the_budget_is_met_from_below_within_one_step(method, budget, seed):
    layers, heads, width, elements = budget
    table = allocate(method, *budget, seed)
    table.check(layers, heads, width)
    assert elements - STEP < table.elements <= elements + 1e-9
    for ranks in (table.keys, table.values):
        assert ranks.dtype == torch.int64
        assert ((ranks % STEP == 0) | (ranks == width)).all()
    if elements == 2 * layers * heads * width:
        assert (table.keys == width).all() and (table.values == width).all()


@pytest.mark.parametrize("method", ["uniform", "energy"])
@given(budgets(heads=(5, 12), widths=(16, 20, 64)), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_many_heads_share_at_most_four_ranks_within_the_budget(method, budget, seed):
    layers, heads, width, elements = budget
    table = allocate(method, *budget, seed)
    table.check(layers, heads, width)
    # the next step of a group moves at most all but three of the heads
    assert elements - STEP * (heads - MAX_GROUPS + 1) < table.elements <= elements + 1e-9
    for row in range(layers):
        groups = table.groups(row)
        assert len(groups) <= MAX_GROUPS
        assert sorted(h for members, _ in groups for h in members) == list(range(heads))
        for members, (key, value) in groups:
            assert set(table.keys[row, members].tolist()) == {key} and set(table.values[row, members].tolist()) == {
                value
            }


@given(budgets())
@settings(deadline=None, max_examples=60)
def test_uniform_is_even(budget):
    table = uniform(*budget)
    every = torch.cat((table.keys.flatten(), table.values.flatten()))
    odd = budget[2] % STEP  # the last step of an odd width is smaller, and may fit where a whole one does not
    assert every.max() - every.min() <= STEP + odd
    if odd:
        return
    if table.keys.max() > table.keys.min():  # values come first
        assert (table.values == table.values.max()).all()
    for ranks in (table.keys, table.values):  # and what is left over is spread over the layers
        steps = ranks.double().sum(1) / STEP
        assert steps.max() - steps.min() <= 2


@given(st.integers(1, 2), st.integers(1, 2), st.sampled_from([16, 24]), st.floats(0, 1), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_energy_is_the_optimum_of_the_additive_model(layers, heads, width, share, seed):
    low, high = smallest(layers, heads, width), 2 * layers * heads * width
    elements = low + share * (high - low)
    key, value = drop_costs(layers, heads, width, seed)
    key, value = key.sort(-1, descending=True)[0], value.sort(-1, descending=True)[0]
    table = by_drop_cost(key, value, elements)

    rows = torch.cat((key, value)).double().reshape(-1, width)
    tails = [{r: float(row[r:].sum()) for r in range(STEP, width + 1, STEP)} for row in rows]
    best = min(
        sum(tail[r] for tail, r in zip(tails, ranks, strict=True))
        for ranks in product(range(STEP, width + 1, STEP), repeat=len(tails))
        if sum(ranks) <= elements
    )
    ranks = torch.cat((table.keys, table.values)).flatten().tolist()
    assert sum(tail[r] for tail, r in zip(tails, ranks, strict=True)) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_energy_goes_where_it_is_lost():
    key, value = torch.zeros(2, 2, 32), torch.zeros(2, 2, 32)
    key[1, 0, :24], value[0, 1, :16] = 1.0, 2.0
    table = by_drop_cost(key, value, smallest(2, 2, 32) + 8 + 16)
    assert table.keys.tolist() == [[8, 8], [24, 8]] and table.values.tolist() == [[8, 16], [8, 8]]


def test_an_unsorted_drop_cost_is_not_stuck_behind_a_small_step():
    """Measured drop costs are noisy: a worthless second step must not hide a valuable third one."""
    key, value = torch.zeros(1, 1, 32), torch.full((1, 1, 32), 0.3)
    key[0, 0, 16:24] = 1.0
    table = by_drop_cost(key, value, 8 + 8 + 16)
    assert (int(table.keys), int(table.values)) == (24, 8)


@pytest.mark.parametrize("method", ["uniform", "energy"])
@given(st.integers(1, 3), st.integers(1, 12), st.sampled_from([16, 20, 32, 64]), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=50)
def test_a_larger_budget_lowers_nothing(method, layers, heads, width, seed, data):
    share = st.floats(smallest(layers, heads, width), 2 * layers * heads * width)
    small, large = sorted((data.draw(share), data.draw(share)))
    a, b = (allocate(method, layers, heads, width, e, seed) for e in (small, large))
    assert (a.keys <= b.keys).all() and (a.values <= b.values).all()


# Arithmetic


def test_elements_of_plain_budgets():
    assert elements_per_token(1000, 0.4) == 400
    assert elements_per_token(1000, 1, exact_tokens=68) == 1000
    # 4 exact tokens of 1,024 are 0.4 %: the others get (0.4 * 1024 - 4) / 1020 of the full size
    assert elements_per_token(1000, 0.4, exact_tokens=4) == pytest.approx(1000 * 405.6 / 1020)


@given(st.integers(1, 10**6), st.floats(0.01, 1), st.integers(0, 128), st.integers(130, 10**5))
def test_exact_tokens_are_paid_for(full, budget, exact, context):
    allowed = budget * full * context
    try:
        left = elements_per_token(full, budget, exact_tokens=exact, context=context)
    except BudgetError:
        assert exact >= budget * context * 0.999
        return
    spent = exact * full + (context - exact) * left
    assert spent <= allowed * (1 + 1e-9)
    assert spent >= allowed * (1 - 1e-9)


@pytest.mark.parametrize(
    "budget, options, message",
    [
        (0, {}, "budget=0 is out of range"),
        (-0.5, {}, "out of range"),
        (1.01, {}, "budget=1.01 is out of range"),
        (float("nan"), {}, "out of range"),
        (0.1, {"exact_tokens": 100, "context": 1000}, "used up by 100 exact tokens"),
        (0.5, {"exact_tokens": 100, "context": 100}, "must be longer than the 100 exact tokens"),
    ],
)
def test_budgets_out_of_range_are_refused(budget, options, message):
    with pytest.raises(BudgetError, match=message):
        elements_per_token(1000, budget, **options)


@pytest.mark.parametrize("method", ["uniform", "energy"])
def test_below_the_smallest_the_message_says_what_can_be_met(method):
    with pytest.raises(BudgetError, match=r"0\.1245 of the full cache .* smallest possible, 0\.1250 \(8 of 64"):
        allocate(method, 2, 2, 64, 2 * 2 * 2 * 8 - 0.25)
    assert allocate(method, 2, 2, 64, 2 * 2 * 2 * 8).elements == 64
    assert allocate(method, 2, 2, 5, 2 * 2 * 2 * 5).keys.tolist() == [[5, 5], [5, 5]]


def test_drop_costs_must_be_finite():
    key, value = drop_costs(2, 2, 16)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BudgetError, match="finite"):
            by_drop_cost(key, value.clone().index_fill_(2, torch.tensor([3]), bad), 100)


# Tables


def test_groups_are_heads_of_equal_ranks():
    table = RankTable(torch.tensor([[8, 16, 8, 16]]), torch.tensor([[8, 8, 8, 24]]))
    assert table.groups(0) == [([3], (16, 24)), ([1], (16, 8)), ([0, 2], (8, 8))]
    assert table.elements == 48 + 48
    again = RankTable.from_dict(table.to_dict())
    assert torch.equal(again.keys, table.keys) and torch.equal(again.values, table.values)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"keys": [[8]]},
        {"keys": [[8]], "values": None},
        {"keys": [[8], [8, 8]], "values": [[8]]},
        {"keys": [["8"]], "values": [[8]]},
        {"keys": [[8.5]], "values": [[8]]},
        {"keys": [[10**30]], "values": [[8]]},
    ],
)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(BudgetError, match="a rank table is"):
        RankTable.from_dict(table)


def test_tables_must_fit():
    good = torch.full((2, 3), 8)
    RankTable(good, good).check(2, 3, 8)
    for keys, values, message in (
        (good[:1], good, r"keys is \[1, 3\], expected \[2, 3\]"),
        (good, good.mT, r"values is \[3, 2\]"),
        (good, good * 2, r"values must be in 1\.\.8, got 16\.\.16"),
        (good * 0, good, r"keys must be in 1\.\.8, got 0\.\.0"),
    ):
        with pytest.raises(BudgetError, match=message):
            RankTable(keys, values).check(2, 3, 8)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([16, 24, 64]), st.floats(0, 1), st.integers(0, 99))
def test_blends_lie_between_drop_costs_and_equal_ranks(layers, heads, width, budget, seed):
    gains = drop_cost_gains(*drop_costs(layers, heads, width, seed))
    elements = max(budget * 2 * layers * heads * width, smallest(layers, heads, width))
    ends = by_gains(gains, elements, width).stacked, uniform(layers, heads, width, elements).stacked
    assert torch.equal(by_gains(blended(gains, 0), elements, width).stacked, ends[0])
    assert torch.equal(by_gains(blended(gains, 1), elements, width).stacked, ends[1])
    middle = by_gains(blended(gains, 0.5), elements, width).stacked
    assert (middle - ends[1]).abs().sum() <= (ends[0] - ends[1]).abs().sum(), "a blend is nearer to equal ranks"
    table = by_gains(blended(gains, 0.5), elements, width)
    assert elements - STEP < table.elements <= elements or table.elements == 2 * layers * heads * width
    larger = by_gains(blended(gains, 0.5), 1.3 * elements, width)
    assert (larger.stacked >= table.stacked).all(), "what a smaller budget keeps a larger one keeps"
