"""Costs measured again where small caches are: against what scaled errors really do, and what follows from it."""

from dataclasses import replace

import pytest
import torch

from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import losses_of
from nestling.kv.allocation.table import CHOICES, Allocation, by_coordinate
from nestling.kv.calibration import correction
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.correction import LEAST, PARTS, RATIO, SHARES, Scaled, added, apart, corrected, raised
from nestling.kv.calibration.costs import Coordinates
from nestling.kv.simulation.student import Student

from ..families import nested_cache

EXACT = FitConfig(sinks=2, window=4, piece_length=40, context=40)


def allocation_of(adapter, seed: int = 0) -> Allocation:
    layers, heads, width = adapter.shape
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor(CHOICES)[torch.randint(len(CHOICES), (2, layers, heads, -(-width // 8)), generator=generator)]
    return Allocation(bits[0], bits[1], width)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_what_errors_add_is_the_slope_of_the_divergence(fitted, ids, family):
    """In the last layer, whose keys and values do not hang on errors before it."""
    made, text = fitted(family), ids[:1, :40]
    adapter = made.adapter
    allocation = allocation_of(adapter)
    found = added(made.model, adapter, allocation, text[0], EXACT)
    assert found.shape == (2, *adapter.shape)
    student = Student(made.model, adapter, sinks=2, window=4).eval()
    step = torch.stack([adapter.step[side] for side in SIDES])
    bits = by_coordinate(allocation.stacked, adapter.shape[2])

    @torch.no_grad()
    def loss(scale: torch.Tensor) -> float:
        cut = Scaled(Coordinates(adapter, torch.device("cpu")), bits, step, scale)
        return float(student.distance(text, student.reading(cut)).double())

    for side in range(2):
        for head in range(adapter.shape[1]):
            change = torch.zeros(2, *adapter.shape)
            change[side, -1, head] = 0.05
            slope = (loss(1 + change) - loss(1 - change)) / 0.1
            assert float(found[side, -1, head].sum()) == pytest.approx(slope / 2, rel=0.05, abs=2e-6)


def test_nothing_is_added_where_nothing_is_lost(fitted, ids):
    adapter = fitted("llama-gqa").adapter
    layers, heads, width = adapter.shape
    full = torch.full((layers, heads, -(-width // 8)), 16)
    found = added(fitted("llama-gqa").model, adapter, Allocation(full, full, width), ids[0, :40], EXACT)
    assert not found.any()


def test_errors_are_those_of_the_cache(fitted, ids):
    """At a scale of 1 what is read is what a quantised cache holds which keeps nothing exact."""
    made, text = fitted("llama-gqa"), ids[:1, :40]
    adapter = made.adapter
    allocation = allocation_of(adapter, 1)
    step = torch.stack([adapter.step[side] for side in SIDES])
    bits = by_coordinate(allocation.stacked, adapter.shape[2])
    cut = Scaled(Coordinates(adapter, torch.device("cpu")), bits, step, torch.ones(2, *adapter.shape))
    with torch.no_grad():
        student = Student(made.model, adapter).eval()
        ours = student.lm(input_ids=text, **student._arguments(student.reading(cut))).logits
        cache = nested_cache(
            made.model, adapter, allocation, sinks=0, window=0, exact_prompt=False, dtype=torch.bfloat16
        )
        read = torch.cat([made.model(input_ids=t, past_key_values=cache).logits for t in text.split(1, 1)], 1)
        exact = student.lm(input_ids=text, use_cache=False).logits
    assert float((ours - read).norm()) < 0.15 * float((ours - exact).norm())  # some codes are rounded the other way


def test_costs_of_dropping_are_raised_where_they_were_too_low(fitted):
    adapter = fitted("llama-gqa").adapter
    allocation = allocation_of(adapter, 2)
    before = losses_of(adapter)
    dropped = (allocation.stacked == 0).nonzero().tolist()
    kept = (allocation.stacked > 0).nonzero().tolist()
    factor = torch.full(before.shape[:-1], RATIO / 2)
    for index, value in ((dropped[0], 30.0), (dropped[1], 5.0), (kept[0], 40.0)):
        factor[tuple(index)] = value
    predicted = before[..., 0].clamp_min(float(before[..., 0].mean()))  # so that none of them is too little to count
    measured = by_coordinate(predicted * factor, adapter.shape[2]) / 8  # of each coordinate of a block
    after = losses_of(raised(adapter, allocation, measured))
    expected = before.clone()
    for index in dropped:
        cost = float((predicted * factor)[tuple(index)])
        if cost > RATIO * float(before[tuple(index)][0]) and cost > LEAST * float((predicted * factor).sum()):
            expected[tuple(index)][0] = (cost * float(before[tuple(index)][0])) ** 0.5
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-12)
    assert float(after[tuple(dropped[0])][0]) > 4 * float(before[tuple(dropped[0])][0])
    assert torch.equal(after[tuple(kept[0])], before[tuple(kept[0])])


def test_a_block_that_costs_a_hundred_times_as_much_is_kept(fitted, ids, monkeypatch):
    """Where it would have been dropped; and where nothing was too low, nothing changes."""
    made = fitted("llama-gqa")
    adapter = made.adapter
    start = adapter.allocate(SHARES[-1])
    dropped = (start.stacked == 0).nonzero()[0].tolist()
    cost = torch.zeros(2, *adapter.shape, dtype=torch.float64)
    cost[tuple(dropped[:3])][8 * dropped[3] : 8 * dropped[3] + 8] = 10.0
    monkeypatch.setattr(correction, "added", lambda model, adapter, allocation, ids, config: cost)
    changed = corrected(made.model, adapter, ids, EXACT, progress=False)
    assert changed.allocate(SHARES[-1]).stacked[tuple(dropped)] > 0
    monkeypatch.setattr(correction, "added", lambda model, adapter, allocation, ids, config: 0 * cost)
    same = corrected(made.model, adapter, ids, EXACT, progress=False)
    assert all(torch.equal(same.quantisation_cost[s], adapter.quantisation_cost[s]) for s in SIDES)


def test_models_whose_states_are_not_told_keep_their_costs(fitted, ids, monkeypatch):
    made = fitted("llama-gqa")
    monkeypatch.setattr(correction, "can_choose", lambda model: False)
    assert corrected(made.model, replace(made.adapter), ids, EXACT, progress=False) == made.adapter


@pytest.mark.parametrize("tokens, context", [(40, 400), (40, 40), (3, 100), (1, 9), (2048, 8192), (41, 1000)])
def test_parts_of_a_piece_are_all_over_the_context(tokens, context):
    positions = apart(tokens, context)
    steps = positions.diff()
    assert positions[0] == 0 and bool((steps > 0).all()) and int(positions[-1]) <= max(context, tokens) - 1
    assert int((steps > 1).sum()) <= PARTS - 1
    if context >= 4 * tokens > 16:
        assert int(positions[-1]) > 0.9 * context


def test_what_is_lost_is_measured_at_these_positions(fitted, ids):
    """Without gaps they are those of any text; and the causal mask still goes over the gaps."""
    made = fitted("llama-gqa")
    adapter, text = made.adapter, ids[:1, :40]
    layers, heads, width = adapter.shape
    none = torch.zeros(layers, heads, -(-width // 8), dtype=torch.long)
    allocation = Allocation(none, torch.full_like(none, 16), width)
    close = added(made.model, adapter, allocation, text[0], replace(EXACT, context=40))
    far = added(made.model, adapter, allocation, text[0], replace(EXACT, context=500))
    student = Student(made.model, adapter, sinks=2, window=4).eval()
    step = torch.stack([adapter.step[side] for side in SIDES])
    bits = by_coordinate(allocation.stacked, width)
    read = Scaled(Coordinates(adapter, torch.device("cpu")), bits, step, torch.ones(2, *adapter.shape))
    with torch.no_grad():
        losses = [
            float(student.distance(text, student.reading(read), positions=apart(40, context))) for context in (40, 500)
        ]
    assert losses[0] == pytest.approx(float(student.distance(text, student.reading(read)).detach()), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert not torch.allclose(close, far, rtol=1e-2)
    masks = torch.ones_like(text), torch.ones(1, 1, 40, 40).tril().log()
    places, decoder = apart(40, 500)[None], made.model.model
    with torch.no_grad():
        states = [decoder(input_ids=text, position_ids=places, attention_mask=m).last_hidden_state for m in masks]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
