"""Ranks at budgets: met from below, optimal, monotone, and refused with a reason where they cannot be met."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.errors import BudgetError
from nestling.kv import Allocation
from nestling.kv.allocation.allocate import blended, by_rank, equal_worth, steps_of, worth
from nestling.kv.allocation.budget import read_share, share_left
from nestling.kv.allocation.steps import MAX_GROUPS, Steps, fill

STEP = 8


def drop_costs(layers: int, heads: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy decaying drop costs whose sizes differ between heads, as calibration measures them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(2, layers, heads, 1, generator=generator) * 3
    noise = torch.rand(2, layers, heads, width, generator=generator) + 0.5
    key, value = scale * noise * torch.exp(-scale * torch.arange(width) / 8)
    return key, value


def ranks_of(method: str, key: torch.Tensor, value: torch.Tensor) -> Steps:
    """The steps of ranks of an adapter that has these drop costs."""
    costs = {"key": key, "value": value}
    return steps_of(SimpleNamespace(shape=tuple(key.shape), drop_cost=costs, paths={}, quantises=False), method)


def at(steps: Steps, elements: float) -> Allocation:
    return Allocation(*steps.table(16 * elements), steps.width)


def allocate(method: str, layers: int, heads: int, width: int, elements: float, seed: int = 0) -> Allocation:
    return at(ranks_of(method, *drop_costs(layers, heads, width, seed)), elements)


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
    assert elements - STEP < table.bits / 16 <= elements + 1e-6
    assert not table.quantised and (table.stacked.diff(dim=-1) <= 0).all(), "the first blocks are kept"
    if elements == 2 * layers * heads * width:
        assert (table.coordinates == width).all()


@pytest.mark.parametrize("method", ["uniform", "energy"])
@given(budgets(heads=(5, 12), widths=(16, 20, 64)), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_many_heads_share_at_most_four_ranks_within_the_budget(method, budget, seed):
    layers, heads, width, elements = budget
    table = allocate(method, *budget, seed)
    table.check(layers, heads, width)
    # the next step of a group moves at most all but three of the heads
    assert elements - STEP * (heads - MAX_GROUPS + 1) < table.bits / 16 <= elements + 1e-6
    for row in range(layers):
        groups = table.groups(row)
        assert len(groups) <= MAX_GROUPS
        assert sorted(h for members, _ in groups for h in members) == list(range(heads))
        for members, (key, value) in groups:
            assert {tuple(bits) for bits in table.keys[row, members].tolist()} == {key}
            assert {tuple(bits) for bits in table.values[row, members].tolist()} == {value}


@given(budgets())
@settings(deadline=None, max_examples=60)
def test_uniform_is_even(budget):
    keys, values = every = allocate("uniform", *budget).coordinates
    odd = budget[2] % STEP  # the last step of an odd width is smaller, and may fit where a whole one does not
    assert every.max() - every.min() <= STEP + odd
    if odd:
        return
    if keys.max() > keys.min():  # values come first
        assert (values == values.max()).all()
    for ranks in (keys, values):  # and what is left over is spread over the layers
        steps = ranks.double().sum(1) / STEP
        assert steps.max() - steps.min() <= 2


@given(st.integers(1, 2), st.integers(1, 2), st.sampled_from([16, 24]), st.floats(0, 1), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_energy_is_the_optimum_of_the_additive_model(layers, heads, width, share, seed):
    low, high = smallest(layers, heads, width), 2 * layers * heads * width
    elements = low + share * (high - low)
    key, value = drop_costs(layers, heads, width, seed)
    key, value = key.sort(-1, descending=True)[0], value.sort(-1, descending=True)[0]
    table = at(ranks_of("energy", key, value), elements)

    rows = torch.cat((key, value)).double().reshape(-1, width)
    tails = [{r: float(row[r:].sum()) for r in range(STEP, width + 1, STEP)} for row in rows]
    best = min(
        sum(tail[r] for tail, r in zip(tails, ranks, strict=True))
        for ranks in product(range(STEP, width + 1, STEP), repeat=len(tails))
        if sum(ranks) <= elements
    )
    ranks = table.coordinates.flatten().tolist()
    assert sum(tail[r] for tail, r in zip(tails, ranks, strict=True)) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(budgets(heads=(1, 9)), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_layer_has_one_rank_and_the_budget_is_met_within_a_step_of_it(budget, seed):
    layers, heads, width, elements = budget
    table = allocate("layer", *budget, seed)
    table.check(layers, heads, width)
    assert not table.quantised and elements - 2 * heads * STEP < table.bits / 16 <= elements + 1e-6
    ranks = table.coordinates
    assert (ranks == ranks[:1, :, :1]).all(), "of all heads, keys as values"
    assert [len(table.groups(row)) for row in range(layers)] == [1] * layers


@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_one_rank_a_layer_is_the_optimum_among_such(layers, heads, share, seed):
    width = 24
    low, high = smallest(layers, heads, width), 2 * layers * heads * width
    elements = low + share * (high - low)
    costs = [side.sort(-1, descending=True)[0] for side in drop_costs(layers, heads, width, seed)]
    chosen = at(ranks_of("layer", *costs), elements).coordinates[0, :, 0].tolist()
    rows = sum(costs).double().sum(1)  # of a layer

    def lost(ranks) -> float:
        return sum(float(row[r:].sum()) for row, r in zip(rows, ranks, strict=True))

    sizes = [8, 16, 24]
    # Steps in order of gain reach the lower hull of all choices: nothing of the same size or less loses less.
    same = [r for r in product(sizes, repeat=layers) if sum(r) <= sum(chosen)]
    assert lost(chosen) == pytest.approx(min(map(lost, same)), rel=1e-9, abs=1e-12)


def test_energy_goes_where_it_is_lost():
    key, value = torch.zeros(2, 2, 32), torch.zeros(2, 2, 32)
    key[1, 0, :24], value[0, 1, :16] = 1.0, 2.0
    table = at(ranks_of("energy", key, value), smallest(2, 2, 32) + 8 + 16)
    assert table.coordinates.tolist() == [[[8, 8], [24, 8]], [[8, 16], [8, 8]]]


def test_an_unsorted_drop_cost_is_not_stuck_behind_a_small_step():
    """Measured drop costs are noisy: a worthless second step must not hide a valuable third one."""
    key, value = torch.zeros(1, 1, 32), torch.full((1, 1, 32), 0.3)
    key[0, 0, 16:24] = 1.0
    assert at(ranks_of("energy", key, value), 8 + 8 + 16).coordinates.flatten().tolist() == [24, 8]


@pytest.mark.parametrize("method", ["uniform", "energy", "layer"])
@given(st.integers(1, 3), st.integers(1, 12), st.sampled_from([16, 20, 32, 64]), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=50)
def test_a_larger_budget_lowers_nothing(method, layers, heads, width, seed, data):
    share = st.floats(smallest(layers, heads, width), 2 * layers * heads * width)
    small, large = sorted((data.draw(share), data.draw(share)))
    a, b = (allocate(method, layers, heads, width, e, seed) for e in (small, large))
    assert (a.stacked <= b.stacked).all()


# Arithmetic


def test_shares_of_plain_budgets():
    assert share_left(0.4) == 0.4
    assert share_left(1, exact_tokens=68) == 1
    # 4 exact tokens of 1,024 are 0.4 %: the others get (0.4 * 1024 - 4) / 1020 of the full size
    assert share_left(0.4, exact_tokens=4) == pytest.approx(405.6 / 1020)


@given(st.floats(0.01, 1), st.integers(0, 128), st.integers(130, 10**5))
def test_exact_tokens_are_paid_for(budget, exact, context):
    allowed = budget * context
    try:
        left = share_left(budget, exact_tokens=exact, context=context)
    except BudgetError:
        assert exact >= budget * context * 0.999
        return
    spent = exact + (context - exact) * left
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
        share_left(budget, **options)


@pytest.mark.parametrize("method", ["uniform", "energy", "layer"])
def test_below_the_smallest_the_message_says_what_can_be_met(method):
    steps = ranks_of(method, *drop_costs(2, 2, 64))
    with pytest.raises(BudgetError, match=r"budget='12\.4%' is below the smallest possible, 0\.125$"):
        steps.required(read_share("12.4%"))
    assert steps.required(read_share("12.5%")).bits == 16 * 64
    assert steps.table(16 * 64 - 0.25) is None
    assert allocate(method, 2, 2, 5, 2 * 2 * 2 * 5).coordinates.tolist() == [[[5, 5]] * 2] * 2


def test_drop_costs_must_be_finite():
    key, value = drop_costs(2, 2, 16)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BudgetError, match="finite"):
            ranks_of("energy", key, value.clone().index_fill_(2, torch.tensor([3]), bad))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([16, 24, 64]), st.floats(0, 1), st.integers(0, 99))
def test_blends_lie_between_drop_costs_and_equal_ranks(layers, heads, width, budget, seed):
    costs = dict(zip(("key", "value"), drop_costs(layers, heads, width, seed), strict=True))
    by_cost = worth(SimpleNamespace(shape=(layers, heads, width), drop_cost=costs), "energy")
    elements = max(budget * 2 * layers * heads * width, smallest(layers, heads, width))

    def ranks(worths: torch.Tensor, elements: float) -> torch.Tensor:
        return at(fill(by_rank(worths, width), width), elements).coordinates

    ends = ranks(by_cost, elements), ranks(equal_worth(layers, heads, width), elements)
    assert torch.equal(ranks(blended(by_cost, width, 0), elements), ends[0])
    assert torch.equal(ranks(blended(by_cost, width, 1), elements), ends[1])
    middle = ranks(blended(by_cost, width, 0.5), elements)
    assert (middle - ends[1]).abs().sum() <= (ends[0] - ends[1]).abs().sum(), "a blend is nearer to equal ranks"
    assert elements - STEP < middle.sum() <= elements + 1e-6 or middle.sum() == 2 * layers * heads * width
    larger = ranks(blended(by_cost, width, 0.5), 1.3 * elements)
    assert (larger >= middle).all(), "what a smaller budget keeps a larger one keeps"
