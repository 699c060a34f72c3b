"""From what an adapter measured to the allocations of all budgets: by bits, or by one of several methods of ranks.

* Bits: a block loses the costs of its coordinates, the drop costs at no bits, and at others quantisation costs, which
  were measured at every width.
* ``energy``: the same with 0 or 16 bits for a block, where a head takes its blocks in order and keeps the first in any
  case. Drop costs of all layers share one unit (see `nestling.kv.calibration.sensitivity`).
* ``uniform``: every head as even as the steps allow.
* ``layer``: by drop cost, with one rank for all heads of a layer, keys and values alike: what engines can serve whose
  pages have one width in a layer.
* A searched path (see `nestling.kv.calibration.search`): in the order of what was measured.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.allocation.steps import Steps, fill
from nestling.kv.allocation.table import CHOICES, Allocation, block_sizes
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.options import shown

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

SIDES = ("key", "value")
# Methods that every adapter has: by drop cost, all heads alike, and by drop cost with the heads of a layer alike.
ENERGY, UNIFORM, LAYER = "energy", "uniform", "layer"


def quantises(adapter: "KVAdapter", method: str | None, quantise: bool) -> bool:
    """Whether an allocation has widths below 16 bits: asked for, measured, and no allocation of ranks named."""
    return quantise and adapter.quantises and method in (None, ENERGY)


def steps_of(adapter: "KVAdapter", method: str | None = None, *, quantise: bool = True) -> Steps:
    """The allocations of an adapter at all budgets, by bits where `quantises` says so, or else by ranks.

    Raises:
        BudgetError: for unknown methods, and costs that are not finite.
    """
    if quantises(adapter, method, quantise):
        return fill(losses_of(adapter), adapter.shape[2])
    method = method or adapter.allocation
    width = adapter.shape[2]
    return fill(by_rank(worth(adapter, method), width), width, grouped=method != UNIFORM, alike=method == LAYER)


def worth(adapter: "KVAdapter", method: str) -> Tensor:
    """What a bit of each block is worth by a method of ranks, ``[2, L, Hkv, blocks]``: its order counts.

    Raises:
        BudgetError: for unknown methods.
    """
    layers, heads, width = adapter.shape
    if method == UNIFORM:
        return equal_worth(layers, heads, width)
    if method in (ENERGY, LAYER):
        drop_cost = torch.stack([adapter.drop_cost[side] for side in SIDES]).double()
        return by_block(drop_cost) / (FULL_BITS * block_sizes(width))
    if isinstance(method, str) and method in adapter.paths:
        return adapter.paths[method].double()
    known = ", ".join(map(repr, (ENERGY, UNIFORM, LAYER, *adapter.paths)))
    raise BudgetError(f"allocation must be {known} or a table, got {shown(method)}")


def equal_worth(layers: int, heads: int, width: int) -> Tensor:
    """The `worth` of blocks where all heads are alike: what is left below a block for all goes to values first, and is
    spread over the layers."""
    first = -torch.arange(len(block_sizes(width)), dtype=torch.float64).expand(2, layers, heads, -1)
    # A fixed order among equals that spreads over layers: the golden ratio's multiples modulo one.
    spread = (torch.arange(layers * heads, dtype=torch.float64) * 0.6180339887498949) % 1
    order = torch.stack((spread, 1 + spread)).reshape(2, layers, heads, 1) / 2
    return first + order * 0.5


def blended(worth: Tensor, width: int, share: float) -> Tensor:
    """Worths between the order of some and that of equal ranks, ``[2, L, Hkv, blocks]``.

    A step's place in either order is the budget from which on it is taken. The blend goes by the weighted mean of both
    places, so that ranks are about the mean of both tables' at any budget.

    Args:
        share: of equal ranks, in [0, 1].
    """
    equal = equal_worth(worth.shape[1], worth.shape[2], width)
    return (1 - share) * _places(_decreasing(worth)) + share * _places(equal)


def _places(worth: Tensor) -> Tensor:
    """Minus the number of blocks that are worth more."""
    order = worth.flatten().argsort(descending=True, stable=True)
    return -order.argsort().view_as(worth).double()


def halvable(share: float, width: int) -> float:
    """The share of the ranks, or the least that leaves heads of ``width`` something to halve if that is more."""
    return max(share, min(1.0, 2 * COORDINATES_PER_BLOCK / width))


def by_block(by_coordinate: Tensor) -> Tensor:
    """Sums over the coordinates of each block, ``[..., D]`` to ``[..., blocks]``."""
    missing = -by_coordinate.shape[-1] % COORDINATES_PER_BLOCK
    return torch.nn.functional.pad(by_coordinate, (0, missing)).unflatten(-1, (-1, COORDINATES_PER_BLOCK)).sum(-1)


def losses_of(adapter: "KVAdapter") -> Tensor:
    """What blocks lose at each number of bits by the costs of an adapter that quantises; see `losses`."""
    return losses(torch.stack([adapter.quantisation_cost[side] for side in SIDES]))


def losses(quantisation_cost: Tensor) -> Tensor:
    """What every block loses at each of `CHOICES`, in nats per token: fp64 ``[2, L, Hkv, blocks, choices]``.

    Args:
        quantisation_cost: of coordinates at no bits and at each width, ``[2, L, Hkv, D, 1 + widths]``; at 16 bits
            nothing is lost.
    """
    return by_block(torch.nn.functional.pad(quantisation_cost.double(), (0, 1)).mT).mT


def predicted(adapter: "KVAdapter", allocation: Allocation) -> float:
    """The KL to the full model that an allocation of bits is expected to cost, in nats per token: the sum of what its
    blocks lose, as measured where the adapter was made. Errors of blocks that add up or cancel are not in it."""
    place = torch.bucketize(allocation.stacked, torch.tensor(CHOICES))
    return float(losses_of(adapter).gather(-1, place[..., None]).sum())


def by_rank(worth: Tensor, width: int) -> Tensor:
    """What every block loses at no bits and at 16, ``[2, L, Hkv, blocks, 2]``, by what a bit of it is worth.

    A head takes its blocks in order: later ones never count for more than earlier ones.
    """
    dropped = _decreasing(worth.double()) * (FULL_BITS * block_sizes(width))
    return torch.stack((dropped, torch.zeros_like(dropped)), -1)


def _decreasing(gains: Tensor) -> Tensor:
    """The closest non-increasing sequence along the last axis (pool adjacent violators): estimates are noisy."""
    out = gains.clone()
    for row in out.reshape(-1, out.shape[-1]):
        pools: list[list[float]] = []
        for value in row.tolist():
            pools.append([value, 1])
            while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
                value_b, count_b = pools.pop()
                value_a, count_a = pools.pop()
                count = count_a + count_b
                pools.append([(value_a * count_a + value_b * count_b) / count, count])
        row.copy_(torch.tensor([v for v, count in pools for _ in range(int(count))], dtype=row.dtype))
    return out
