"""Noise of coordinates against gradients of a stock model, token by token, and against noise that is really added."""

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from nestling.kv.adapter_files import SIDES
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.moments import SKIP
from nestling.kv.calibration.noise import EVERY, Noise
from nestling.kv.calibration.sensitivity import measure, sensitivity
from nestling.kv.integration.attach import cached
from nestling.kv.quantisation.quantiser import WIDTHS
from nestling.losses import kl_divergence


class Shifted(DynamicLayer):
    """A stock layer whose keys and values are moved by ``shift`` ``[2, B, Hkv, T, D]``, and remembered."""

    def __init__(self, shift: torch.Tensor):
        super().__init__()
        self.shift, self.seen = shift, ()

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen = key_states.detach(), value_states.detach()
        return super().update(key_states + self.shift[0], value_states + self.shift[1])


def stock_logits(model, ids, shifts):
    layers = [Shifted(shift) for shift in shifts]
    return model(input_ids=ids, **cached(model, Cache(layers=layers))).logits, layers


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_quantisation_cost_is_the_sum_over_tokens_of_squared_gradients(fitted, ids, family):
    made, text = fitted(family), ids[:2, :24]
    layers, heads, width = made.adapter.shape
    noise = Noise(made.adapter, torch.device("cpu"))
    sensitivity(made.model, made.adapter, [text], sinks=0, window=0, seed=3, noise=[noise])
    costs = noise.measured(text.numel())
    found, steps, errors = costs.quantisation_cost, costs.step, costs.errors
    assert all(
        len(errors[side]) == len(WIDTHS) and sorted(errors[side], reverse=True) == errors[side] for side in SIDES
    )

    shifts = torch.zeros(layers, 2, 2, heads, 24, width, requires_grad=True)
    logits, held = stock_logits(made.stock, text, shifts)
    log_p = logits.log_softmax(-1)
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator).view(2, 24, 1)
    (gradient,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), shifts)
    for side, name in enumerate(SIDES):
        for row in range(layers):
            by_coordinate = gradient[row, side] @ made.adapter.decode[name][row].mT  # [B, Hkv, T, D]
            states = held[row].seen[side][:, :, SKIP::EVERY]
            z = (states - made.adapter.mean[name][row][:, None]) @ made.adapter.encode[name][row]
            power = z.square().mean((0, 2))
            expected = by_coordinate.square().sum((0, 2)) * power / (2 * text.numel())
            torch.testing.assert_close(found[name][row], expected, rtol=2e-3, atol=1e-9)
            assert (steps[name][row] / power.sqrt()).median() == pytest.approx(0.3, abs=0.1)


@torch.no_grad()
def test_quantisation_cost_predicts_the_kl_of_noise_that_is_added(fitted, ids):
    made = fitted("llama-gqa")
    config = FitConfig(sensitivity_windows=16, sensitivity_length=64, sinks=0, window=0)
    adapter = measure(made.model, made.adapter, ids, config, progress=False)
    layers, heads, width = adapter.shape
    clean = made.stock(input_ids=ids).logits.flatten(0, 1)
    rng, share = torch.Generator().manual_seed(0), 0.05
    for side, name in enumerate(SIDES):
        # Steps are near 0.3 root mean squares: independent noise of that share of it, on all coordinates at once.
        spread = share * adapter.step[name] / 0.3
        shifts, totals = torch.zeros(layers, 2, len(ids), heads, 64, width), []
        for _ in range(8):
            z = torch.randn(layers, len(ids), heads, 64, width, generator=rng) * spread[:, None, :, None]
            shifts[:, side] = z @ adapter.decode[name][:, None]
            logits, _ = stock_logits(made.stock, ids, shifts)
            totals.append(kl_divergence(clean, logits.flatten(0, 1)).mean())
        predicted = float(adapter.quantisation_cost[name].sum()) * share**2
        assert float(torch.stack(totals).mean()) == pytest.approx(predicted, rel=0.4)


def test_an_adapter_keeps_the_order_of_all_that_belongs_to_a_coordinate(fitted):
    """Sorted bases: quantisation costs and steps follow their coordinates, so they fall with the drop costs."""
    adapter = fitted("llama-gqa").adapter
    assert adapter.quantises
    for side in SIDES:
        ranks = [
            values[side].argsort(-1).argsort(-1).double() for values in (adapter.drop_cost, adapter.quantisation_cost)
        ]
        assert torch.corrcoef(torch.stack([r.flatten() for r in ranks]))[0, 1] > 0.3
