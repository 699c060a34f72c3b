"""What coordinates cost if they are dropped, and if they are off by a little token by token, as quantised ones are.

Dropping a coordinate moves all tokens together, and what it does to them cancels or adds up; the errors of a quantiser
are independent. With labels y drawn from the model, noise of variance s^2 on coordinate i of every token costs about
``s^2 / 2 * sum over tokens of E[(d log p(y) / d z_ti)^2]`` nats of KL: squares of the same gradients, summed in the
other order.

At full ranks what is read does not depend on the bases, nor does its gradient: one pass measures any number of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.cache.exact import SKIP
from nestling.kv.quantisation.quantiser import chosen_steps

EVERY = 8  # tokens of which one is kept as a sample


@dataclass(frozen=True)
class Costs:
    """What coordinates cost at full ranks, by side, in nats of KL per token.

    Attributes:
        drop_cost: if a coordinate was at its mean, ``[L, Hkv, D]``.
        quantisation_cost: if it was off by as much as it varies, independently for every token, ``[L, Hkv, D]``.
        step: of quantisers, ``[L, Hkv, D]``, see `nestling.kv.quantisation.quantiser`.
        error: their errors at all widths, ``[L, Hkv, D, widths]``, as shares of the mean squares.
    """

    drop_cost: dict[str, Tensor]
    quantisation_cost: dict[str, Tensor]
    step: dict[str, Tensor]
    error: dict[str, Tensor]

    @property
    def errors(self) -> dict[str, list[float]]:
        """The errors on average, weighted by quantisation cost."""
        errors = {}
        for side, quantisation_cost in self.quantisation_cost.items():
            weight = quantisation_cost.double() / quantisation_cost.double().sum().clamp_min(1e-300)
            errors[side] = (weight[..., None] * self.error[side]).flatten(0, 2).sum(0).tolist()
        return errors

    def of(self, adapter: KVAdapter) -> KVAdapter:
        """The adapter with these costs; what was searched by other ones is left out."""
        info = {**adapter.info, "errors": self.errors}
        costs = {name: getattr(self, name) for name in ("drop_cost", "quantisation_cost", "step")}
        return replace(adapter, **costs, paths={}, info=info)


class Noise:
    """Looks at the keys and values of a student at full ranks, and at their gradients, as `Masked` shows them."""

    def __init__(self, adapter: KVAdapter, device: torch.device):
        self.encode, self.decode, self.mean = (
            torch.stack([getattr(adapter, name)[side] for side in SIDES]).to(device)
            for name in ("encode", "decode", "mean")
        )
        self.dropped, self.squares = torch.zeros(2, 2, *adapter.shape, dtype=torch.float64, device=device)
        self.samples: list[list[list[Tensor]]] = [[[] for _ in range(adapter.shape[0])] for _ in SIDES]

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor) -> None:
        """Keys (side 0) or values (side 1) of a layer, ``[B, Hkv, T, D]``, and what the attention reads of them."""
        mean, encode, decode = (part[side, row].to(states.device) for part in (self.mean, self.encode, self.decode))
        z = (states.detach().float() - mean[:, None]) @ encode
        self.samples[side][row].append(z[:, :, SKIP::EVERY].transpose(0, 1).flatten(1, 2).cpu())

        def add(gradient: Tensor) -> None:
            by_coordinate = gradient.float() @ decode.mT
            together = (z * by_coordinate).sum(2).double().square().sum(0)
            self.dropped[side, row] += together.to(self.dropped.device)
            self.squares[side, row] += by_coordinate.square().sum((0, 2)).double().to(self.squares.device)

        cut.register_hook(add)

    def measured(self, tokens: int) -> Costs:
        """What coordinates cost per token, of so many tokens."""
        drop_cost = {side: (self.dropped[i].cpu() / (2 * tokens)).float() for i, side in enumerate(SIDES)}
        quantisation_cost, steps, errors = {}, {}, {}
        for number, side in enumerate(SIDES):
            rows = [self._of_layer(number, row, tokens) for row in range(len(self.samples[number]))]
            parts = map(torch.stack, zip(*rows, strict=True))
            quantisation_cost[side], steps[side], errors[side] = parts
        return Costs(drop_cost, quantisation_cost, steps, errors)

    def _of_layer(self, side: int, row: int, tokens: int) -> Sequence[Tensor]:
        samples = torch.cat(self.samples[side][row], 1)
        step, error = chosen_steps(samples)
        power = samples.double().square().mean(-2)
        return (self.squares[side, row].cpu() * power / (2 * tokens)).float(), step, error
