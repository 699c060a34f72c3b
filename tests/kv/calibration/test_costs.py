"""Costs of quantised coordinates against gradients of a stock model, and against what quantising really does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import Cache, DynamicLayer

from nestling.errors import OptionError
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import losses_of
from nestling.kv.allocation.steps import fill
from nestling.kv.allocation.table import CHOICES
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.costs import EVERY, QuantisationErrors, Samples, between, shrunk
from nestling.kv.calibration.fit import measure
from nestling.kv.calibration.moments import SKIP
from nestling.kv.calibration.search import KLMeter
from nestling.kv.calibration.sensitivity import at_full_ranks, longest, sensitivity
from nestling.kv.integration.attach import cached
from nestling.kv.quantisation.quantiser import WIDTHS, chosen_steps, rounded
from nestling.kv.simulation.student import Student

CPU = torch.device("cpu")


class Shifted(DynamicLayer):
    """A stock layer whose keys and values are moved by ``shift`` ``[2, B, Hkv, T, D]``, and remembered."""

    def __init__(self, shift: torch.Tensor):
        super().__init__()
        self.shift, self.seen = shift, ()

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen = key_states.detach(), value_states.detach()
        return super().update(key_states + self.shift[0], value_states + self.shift[1])


def stock_logits(model, ids, shifts, **options):
    layers = [Shifted(shift) for shift in shifts]
    return model(input_ids=ids, **options, **cached(model, Cache(layers=layers))).logits, layers


@pytest.mark.parametrize("family, first", [("llama-gqa", 0), ("qwen3", 7)])
def test_costs_are_of_the_errors_of_quantisers_along_gradients(fitted, ids, family, first):
    """By hand, on the stock model: labels at the same tokens, from the same draw, at the same positions."""
    made, text = fitted(family), ids[:2, :24]
    layers, heads, width = made.adapter.shape
    step = torch.full((2, layers, heads, width), 0.1)
    watch = QuantisationErrors(made.adapter, step, CPU)
    exact = FitConfig(sinks=0, window=0, seed=3)
    sensitivity(made.model, made.adapter, [text], exact, positions=[first], watch=[watch])

    shifts = torch.zeros(layers, 2, 2, heads, 24, width, requires_grad=True)
    logits, held = stock_logits(made.stock, text, shifts, position_ids=torch.arange(first, first + 24).expand(2, -1))
    log_p = logits.log_softmax(-1)
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator).view(2, 24, 1)
    (gradient,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), shifts)
    for side, name in enumerate(SIDES):
        for row in range(layers):
            by_coordinate = gradient[row, side] @ made.adapter.decode[name][row].mT  # [B, Hkv, T, D]
            z = (held[row].seen[side] - made.adapter.mean[name][row][:, None]) @ made.adapter.encode[name][row]
            for place, bits in enumerate((0, *WIDTHS)):
                effect = by_coordinate * ((rounded(z, step[side, row][:, None], bits) if bits else 0 * z) - z)
                for total, expected in (
                    (watch.together, effect.sum(2).square().sum(0) / 2),
                    (watch.squares, (effect.sum(2).square() / 2).square().sum(0)),
                    (watch.apart, effect.square().sum((0, 2)) / 2),
                ):
                    torch.testing.assert_close(
                        total[side, row, ..., place], expected.double(), rtol=5e-3, atol=1e-3 * float(expected.max())
                    )


def test_steps_are_chosen_by_what_is_seen(fitted, ids):
    made, text = fitted("llama-gqa"), ids[:2]
    samples = Samples(made.adapter, CPU)
    Student(made.model, made.adapter).watched(text, [samples])
    _, held = stock_logits(made.stock, text, torch.zeros(made.adapter.shape[0], 2, 1, 1, 1, 1))
    for side, name in enumerate(SIDES):
        for row, layer in enumerate(held):
            states = layer.seen[side][:, :, SKIP::EVERY].transpose(0, 1).flatten(1, 2)
            z = (states - made.adapter.mean[name][row][:, None]) @ made.adapter.encode[name][row]
            torch.testing.assert_close(samples.steps()[side, row], chosen_steps(z), rtol=1e-4, atol=1e-7)


def test_costs_predict_the_kl_of_an_allocation(fitted, ids):
    made = fitted("llama-gqa")
    config = FitConfig(pieces=8, piece_length=64, sensitivity_length=64, sinks=0, window=0, context=64)
    adapter = measure(made.model, made.adapter, ids, config, progress=False)
    lost = losses_of(adapter).double()
    meter = KLMeter(made.model, adapter, ids, 0, 0)
    for share in (0.5, 0.25):
        table = fill(lost, adapter.shape[2]).at(share).stacked
        places = torch.tensor([CHOICES.index(bits) for bits in table.flatten().tolist()])
        predicted = float(lost.flatten(0, -2)[torch.arange(len(places)), places].sum())
        assert 0.4 < predicted / float(meter(table[None])) < 2.5


@given(seed=st.integers(0, 2**31), texts=st.integers(4, 64))
def test_estimates_are_pulled_together_as_far_as_texts_disagree(seed, texts):
    """Samples with a mean of their own in each coordinate, and others that all have one mean."""
    rng = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2, 64, 2)
    own = torch.ones(shape, dtype=torch.float64)
    own[..., 1] = torch.randn(shape[:-1], generator=rng, dtype=torch.float64).mul(2).exp()
    values = own * torch.randn(texts, *shape, generator=rng, dtype=torch.float64).square()
    estimate = shrunk(values.sum(0), values.square().sum(0), torch.ones(shape, dtype=torch.float64), texts) / texts
    raw = values.mean(0)
    error = [
        ((x.log() - own.log()) - (x.log() - own.log()).mean()).square().mean((0, 1, 2, 3)) for x in (estimate, raw)
    ]
    assert error[0][0] < 0.5 * error[1][0]  # alike: most of the noise is gone
    assert error[0][1] < 1.1 * error[1][1]  # unlike: nothing is lost
    torch.testing.assert_close(estimate.sum((2, 3)), raw.sum((2, 3)))  # a layer keeps its level


def test_what_is_never_read_costs_nothing():
    zeros = torch.zeros(2, 1, 1, 8, 3, dtype=torch.float64)
    assert torch.equal(shrunk(zeros, zeros, zeros, 8), zeros)
    assert torch.equal(between(zeros[0].float(), zeros[0].float()), zeros[0].float())


def test_drop_costs_are_between_those_at_full_and_at_half_ranks():
    """In their logarithms half way, whatever the level of those at half."""
    full, half = torch.tensor([[[8.0, 1, 1, 0]]]), torch.tensor([[[2.0, 4, 4, 3]]])
    torch.testing.assert_close(between(full, full), full)
    assert torch.equal(between(full, half) == 0, full == 0)
    for level in (1, 1e-4, 1e4):
        ratios = (between(full, half * level)[..., :3] / full[..., :3]).log()
        expected = (half[..., :3] / full[..., :3] * full.sum() / half.sum()).log() / 2
        torch.testing.assert_close(ratios, expected)


def test_pieces_may_be_longer_than_windows_and_begin_all_over_the_context(fitted, ids, monkeypatch):
    made, seen = fitted("llama-gqa"), []
    stock = Student.logits

    def spy(self, input_ids, masked, first=0, tokens=None):
        seen.append((input_ids.tolist(), first))
        return stock(self, input_ids, masked, first, tokens)

    monkeypatch.setattr(Student, "logits", spy)
    config = FitConfig(pieces=3, piece_length=128, context=500, sinks=0, window=0)
    at_full_ranks(made.model, [made.adapter], ids[:6], config, False)
    rows = ids[:6].reshape(3, 1, 128).tolist()
    assert [text for text, _ in seen] == rows * 2
    assert [first for _, first in seen[:3]] == [first for _, first in seen[3:]]
    assert sorted(first for _, first in seen[:3]) == [0, 186, 372]


def test_a_context_beyond_the_model_is_refused(fitted):
    model = fitted("llama-gqa").model
    limit = model.config.max_position_embeddings
    assert longest(model, FitConfig()) == min(limit, 8192)
    with pytest.raises(OptionError, match=f"context={limit + 1}"):
        longest(model, FitConfig(context=limit + 1))


def test_an_adapter_keeps_the_order_of_all_that_belongs_to_a_coordinate(fitted):
    """Sorted bases: quantisation costs and steps follow their coordinates, so they fall with the drop costs."""
    adapter = fitted("llama-gqa").adapter
    assert adapter.quantises
    for side in SIDES:
        costs = adapter.drop_cost[side], adapter.quantisation_cost[side][..., 0]
        ranks = [values.argsort(-1).argsort(-1).double() for values in costs]
        assert torch.corrcoef(torch.stack([r.flatten() for r in ranks]))[0, 1] > 0.3
