"""How the mean of keys moves with their position, measured: the same texts are read at every span of positions.

Texts differ more than the means of spans do, so each span has the same ones. What they say is taken against their own
mean at the first positions, where the moments were gathered.
"""

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.cache.drift import SPAN
from nestling.kv.cache.rule import SKIP
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.sensitivity import longest
from nestling.kv.integration.attach import input_device, served
from nestling.kv.simulation.student import Student

TEXTS = 4  # of a span each
STILL = 1e-3  # of the root mean square of keys: what moves less does not move


class KeySums:
    """Looks at keys as `Masked` shows them, and adds them up, ``[L, Hkv, D]`` fp64."""

    def __init__(self, adapter: KVAdapter):
        self.total = torch.zeros(adapter.shape, dtype=torch.float64)
        self.squares = torch.zeros(adapter.shape, dtype=torch.float64)
        self.tokens = 0

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor, positions: Tensor) -> None:
        if side == 0:
            keys = states.detach()[:, :, SKIP:].double()
            self.total[row] += keys.sum((0, 2)).cpu()
            self.squares[row] += keys.square().sum((0, 2)).cpu()
            self.tokens += keys.shape[0] * keys.shape[2] * (row == 0)


def key_drift(model, adapter: KVAdapter, windows: Tensor, config: FitConfig, bar) -> Tensor | None:
    """The ``drift`` of an adapter over the context, ``[L, Hkv, spans, D]``; None for keys that stay where they are.

    Args:
        windows: token ids ``[n, T]``, of which some are read.
        config: its context, and the length of the windows that ``adapter.mean`` comes from.
        bar: a progress bar.
    """
    context = longest(model, config)
    spans, length = max(context // SPAN, 1), min(SPAN, context, windows.shape[1])
    if spans < 2 or length <= SKIP:
        return None
    texts = windows[torch.linspace(0, len(windows) - 1, min(TEXTS, len(windows))).round().long(), :length]
    means, size = [], torch.zeros(())
    with served(model), torch.no_grad():
        student = Student(model, adapter).eval()
        for span in bar.track(range(spans), description="means by position"):
            sums = KeySums(adapter)
            student.watched(texts.to(input_device(model)), [sums], span * SPAN)
            means.append(sums.total / sums.tokens)
            size = (sums.squares.mean() / sums.tokens).sqrt()
    by_span = torch.stack(means, 2)
    first = max(round(min(config.length, context) / SPAN), 1)
    drift = by_span - by_span[:, :, :first].mean(2, keepdim=True)
    return drift.float() if drift.abs().max() > STILL * size else None
