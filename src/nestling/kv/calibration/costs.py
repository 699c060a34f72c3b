"""What the predictions lose if a coordinate is dropped, and if it is quantised to each width.

With labels y drawn from the model, errors e_t of what is read of the tokens t of a text cost about
``E[(sum over t of e_t d log p(y) / d z_t)^2] / 2`` nats of KL. The errors are those of the quantiser itself, so that
it counts what they have in common over a text, and that they are largest where it matters. But each text is a single
sample of that square. With the tokens taken apart, ``sum over t of (e_t d log p(y) / d z_t)^2 / 2`` is steady, and
too low, by a factor that is much the same for all coordinates of a layer. So the latter is scaled by that factor, and
moved towards a coordinate's own one as far as the texts agree on it.

At full ranks what is read does not depend on the bases, nor does its gradient: one pass measures any number of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.cache.drift import Means
from nestling.kv.cache.rule import SKIP
from nestling.kv.quantisation.quantiser import WIDTHS, chosen_steps, rounded

EVERY = 8  # tokens of which one is kept as a sample
FEW = 4  # texts: of fewer it cannot be told how much they agree
TINY = 1e-30


@dataclass(frozen=True)
class Costs:
    """What coordinates cost at full ranks, by side, in nats of KL per token.

    Attributes:
        drop_cost: if a coordinate was at its mean, ``[L, Hkv, D]``.
        quantisation_cost: at no bits and at each of `WIDTHS`, ``[L, Hkv, D, 1 + widths]``.
        step: of quantisers, ``[L, Hkv, D]``, see `nestling.kv.quantisation.quantiser`.
    """

    drop_cost: dict[str, Tensor]
    quantisation_cost: dict[str, Tensor]
    step: dict[str, Tensor]

    def of(self, adapter: KVAdapter) -> KVAdapter:
        """The adapter with these costs; what was searched and measured by other ones is left out."""
        costs = {name: getattr(self, name) for name in ("drop_cost", "quantisation_cost", "step")}
        info = {key: value for key, value in adapter.info.items() if key != "measured"}
        return replace(adapter, **costs, info=info, paths={})


class Coordinates:
    """The coordinates of keys and values in an adapter's bases, and of gradients by what is read of them."""

    def __init__(self, adapter: KVAdapter, device: torch.device):
        self.encode, self.decode, self.mean = (
            torch.stack([getattr(adapter, name)[side] for side in SIDES]).to(device)
            for name in ("encode", "decode", "mean")
        )
        self.shape, self.means = adapter.shape, Means(self.mean, adapter.drift)

    def of(self, side: int, row: int, states: Tensor) -> Tensor:
        """``[B, Hkv, T, D]`` of keys (side 0) or values (side 1), about their means."""
        mean, encode = (part[side, row].to(states.device) for part in (self.mean, self.encode))
        return (states.detach().float() - mean[:, None]) @ encode

    def dropped(self, side: int, row: int, positions: Tensor) -> Tensor:
        """What is read of coordinates that are not stored, about their means, ``[Hkv, T, D]``: the drift of these."""
        means, spans = self.means.by_span(side, row, positions)
        mean, encode = (part[side, row].to(positions.device) for part in (self.mean, self.encode))
        return ((means - mean[:, None]) @ encode).index_select(1, spans)

    def states(self, side: int, row: int, z: Tensor) -> Tensor:
        """Keys or values again, without their means."""
        return z @ self.decode[side, row].to(z.device)

    def gradient(self, side: int, row: int, gradient: Tensor) -> Tensor:
        """By coordinates, of that by keys or values."""
        return gradient.float() @ self.decode[side, row].to(gradient.device).mT


class Samples:
    """Looks at keys and values as `Masked` shows them, and keeps some of their coordinates, to choose steps by."""

    def __init__(self, adapter: KVAdapter, device: torch.device):
        self.coordinates = Coordinates(adapter, device)
        self.kept: list[list[list[Tensor]]] = [[[] for _ in range(adapter.shape[0])] for _ in SIDES]

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor, positions: Tensor) -> None:
        z = self.coordinates.of(side, row, states)
        self.kept[side][row].append(z[:, :, SKIP::EVERY].transpose(0, 1).flatten(1, 2).cpu())

    def steps(self) -> Tensor:
        """``[2, L, Hkv, D]``."""
        return torch.stack([torch.stack([chosen_steps(torch.cat(layer, 1)) for layer in s]) for s in self.kept])


class QuantisationErrors:
    """Looks at keys and values and at their gradients as `Masked` shows them, at full ranks: each row is a text.

    Args:
        step: ``[2, L, Hkv, D]``.
    """

    def __init__(self, adapter: KVAdapter, step: Tensor, device: torch.device):
        self.coordinates, self.step = Coordinates(adapter, device), step.to(device)
        shape = (2, *adapter.shape, 1 + len(WIDTHS))
        # Sums over texts, at no bits and at each width: of the costs with all tokens together, of the squares of
        # those, and with tokens apart.
        self.together, self.squares, self.apart = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)
        )

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor, positions: Tensor) -> None:
        z = self.coordinates.of(side, row, states)
        dropped = self.coordinates.dropped(side, row, positions)

        def add(gradient: Tensor) -> None:
            by_coordinate = self.coordinates.gradient(side, row, gradient)
            step = self.step[side, row, :, None].to(z.device)
            for place, bits in enumerate((0, *WIDTHS)):
                error = rounded(z, step, bits) - z if bits else dropped - z
                effect = by_coordinate * error
                cost = effect.sum(2).double().square() / 2
                apart = effect.square().sum((0, 2)).double() / 2
                for total, more in ((self.together, cost.sum(0)), (self.squares, cost.square().sum(0))):
                    total[side, row, ..., place] += more.to(total.device)
                self.apart[side, row, ..., place] += apart.to(self.apart.device)

        cut.register_hook(add)

    def measured(self, tokens: int, texts: int) -> Costs:
        """What coordinates cost per token, of so many tokens in so many texts."""
        together, squares, apart = (part.cpu() for part in (self.together, self.squares, self.apart))
        cost = shrunk(together, squares, apart, texts) / tokens
        parts = (part.float().cpu() for part in (cost[..., 0], cost, self.step))
        return Costs(*({side: part[i] for i, side in enumerate(SIDES)} for part in parts))


def between(full: Tensor, half: Tensor) -> Tensor:
    """The geometric mean of two measurements of the same costs, ``[L, Hkv, D]``, at the level of the first.

    At full ranks a few coordinates cost most of all; once others are gone they do not. Either alone is wrong at one
    end of the budgets.
    """
    level = full.sum() / half.sum().clamp_min(TINY)
    return (full.clamp_min(0) * half.clamp_min(0) * level).sqrt()


def shrunk(together: Tensor, squares: Tensor, apart: Tensor, texts: int) -> Tensor:
    """Estimates of the expectation of ``together``, ``[2, L, Hkv, D, n]``, from sums over texts.

    ``apart`` times the factor of a layer, times a power of a coordinate's own factor. The exponent, one for each side
    and width, is the share of the spread of the logarithms of these own factors that is not their noise over texts.

    Args:
        together: noisy, one value a text.
        squares: the sums of the squares of these values.
        apart: in proportion to their expectation, more or less, with little noise.
    """
    pooled = together.sum((2, 3), keepdim=True) / apart.sum((2, 3), keepdim=True).clamp_min(TINY)
    prior = apart * pooled
    own = ((together + TINY) / (prior + TINY)).log()
    noise = (squares / together.square().clamp_min(TINY**2) - 1 / texts).clamp_min(0)
    spread = own.var((1, 2, 3), keepdim=True)
    exponent = (1 - noise.mean((1, 2, 3), keepdim=True) / spread.clamp_min(TINY)).clamp(0, 1) * (texts >= FEW)
    cost = prior * (exponent * own).exp()
    scale = together.sum((2, 3), keepdim=True) / cost.sum((2, 3), keepdim=True).clamp_min(TINY)
    return cost * scale
