"""Noise: what it costs if coordinates are off by a little, token by token, as quantised ones are.

Dropping a coordinate moves all tokens together, and what it does to them cancels or adds up; the errors of a quantiser
are independent. With labels y drawn from the model, noise of variance s^2 on coordinate i of every token costs about
``s^2 / 2 * sum over tokens of E[(d log p(y) / d z_ti)^2]`` nats of KL: squares of the same gradients, summed in the
other order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.cache.exact import SKIP
from nestling.kv.quantisation.quantiser import WIDTHS, chosen_steps

EVERY = 8  # tokens of which one is kept as a sample


class Noise:
    """Looks at the keys and values of a student at full ranks, and at their gradients, as `Masked` shows them."""

    def __init__(self, adapter: KVAdapter, device: torch.device):
        self.encode, self.decode, self.mean = (
            torch.stack([getattr(adapter, name)[side] for side in SIDES]).to(device)
            for name in ("encode", "decode", "mean")
        )
        self.squares = torch.zeros(2, *adapter.shape, dtype=torch.float64, device=device)
        self.samples: list[list[list[Tensor]]] = [[[] for _ in range(adapter.shape[0])] for _ in SIDES]

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor) -> None:
        """Keys (side 0) or values (side 1) of a layer, ``[B, Hkv, T, D]``, and what the attention reads of them."""
        mean, encode, decode = (part[side, row].to(states.device) for part in (self.mean, self.encode, self.decode))
        z = (states[:, :, SKIP::EVERY].detach().float() - mean[:, None]) @ encode
        self.samples[side][row].append(z.transpose(0, 1).flatten(1, 2).cpu())

        def add(gradient: Tensor) -> None:
            squares = (gradient.float() @ decode.mT).square().sum((0, 2)).double()
            self.squares[side, row] += squares.to(self.squares.device)

        cut.register_hook(add)

    def measured(self, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[float]]]:
        """Noise, steps and errors of quantisers, by side.

        Returns:
            Noise ``[L, Hkv, D]``, in nats of KL per token, if a coordinate was off by as much as it varies; steps
            ``[L, Hkv, D]``, see `quantise`; and the errors at `WIDTHS` on average, weighted by noise, as shares.
        """
        noise, steps, errors = {}, {}, {}
        for number, side in enumerate(SIDES):
            rows = [self._of_layer(number, row, tokens) for row in range(len(self.samples[number]))]
            cost, step, error = (torch.stack(part) for part in zip(*rows, strict=True))
            noise[side], steps[side] = cost, step
            weight = cost.double() / cost.double().sum().clamp_min(1e-300)
            errors[side] = [float((weight * error[..., i]).sum()) for i in range(len(WIDTHS))]
        return noise, steps, errors

    def _of_layer(self, side: int, row: int, tokens: int) -> Sequence[Tensor]:
        samples = torch.cat(self.samples[side][row], 1)
        step, error = chosen_steps(samples)
        power = samples.double().square().mean(-2)
        return (self.squares[side, row].cpu() * power / (2 * tokens)).float(), step, error
