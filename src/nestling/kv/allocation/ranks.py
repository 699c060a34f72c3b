"""From a budget to ranks: how many coordinates each layer and KV head keeps, of keys and of values.

A budget is a number of elements per token. All allocations take steps of `STEP` coordinates of one head, the most
valuable step first, until the next one would not fit, so they end within one step below the budget:

* ``uniform``: every head as even as the steps allow.
* ``energy``: one global sort of the drop costs. Those of all layers must share one unit; `nestling.kv.fit`
  puts them in nats of KL per token (see `nestling.kv.calibration.sensitivity`).
* A searched path (see `nestling.kv.calibration.search`): a sort by what was measured.

Groups: a layer stores its heads in at most `MAX_GROUPS` rank groups. In models with more KV heads, heads with similar
ranks are tied together, at every budget the same ones, and the steps are taken for the groups, at the group's cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocation.budget import CONTEXT
from nestling.kv.allocation.steps import Steps

STEP = 8
MAX_GROUPS = 4
CLUSTERED_AT = (0.75, 0.5, 0.25)  # shares of the cost of all steps, at which heads are compared to be grouped

Units = list[list[list[int]]]  # of each layer, the lists of heads that move together


@dataclass(frozen=True)
class RankTable:
    """Ranks of every compressed layer and KV head: ``keys`` and ``values``, int64 ``[L, Hkv]``."""

    keys: Tensor
    values: Tensor

    @property
    def stacked(self) -> Tensor:
        """Keys and values in one tensor, ``[2, L, Hkv]``."""
        return torch.stack((self.keys, self.values))

    @property
    def elements(self) -> int:
        """Elements stored per token, keys and values of all layers."""
        return int(self.keys.sum() + self.values.sum())

    def groups(self, row: int) -> list[tuple[list[int], tuple[int, int]]]:
        """The rank groups of a layer: (heads, (key rank, value rank)), widest first."""
        pairs = list(zip(self.keys[row].tolist(), self.values[row].tolist(), strict=True))
        return [([h for h, p in enumerate(pairs) if p == pair], pair) for pair in sorted(set(pairs), reverse=True)]

    def check(self, layers: int, heads: int, width: int) -> None:
        """Raise `BudgetError` unless the table fits ``layers`` x ``heads`` heads of ``width`` coordinates."""
        for name, ranks in (("keys", self.keys), ("values", self.values)):
            if ranks.dtype != torch.int64:
                raise BudgetError(f"rank table: {name} are {ranks.dtype}, expected whole numbers, torch.int64")
            if tuple(ranks.shape) != (layers, heads):
                raise BudgetError(f"rank table: {name} is {list(ranks.shape)}, expected [{layers}, {heads}]")
            if ranks.min() < 1 or ranks.max() > width:
                raise BudgetError(
                    f"rank table: {name} must be in 1..{width}, got {int(ranks.min())}..{int(ranks.max())}"
                )

    def token_bytes(self, width: int, itemsize: int) -> list[int]:
        """Bytes of the coordinates of a token in each layer, of ``itemsize`` bytes each; for heads of any width."""
        return (self.stacked.sum((0, 2)) * itemsize).tolist()

    def full(self, width: int) -> list[bool]:
        """For each layer, whether nothing of it is compressed."""
        return (self.stacked == width).all(2).all(0).tolist()

    def to_dict(self) -> dict[str, list[list[int]]]:
        return {"keys": self.keys.tolist(), "values": self.values.tolist()}

    @classmethod
    def from_dict(cls, table: dict) -> "RankTable":
        try:
            keys, values = (torch.tensor(table[side]) for side in ("keys", "values"))
            if not keys.dtype == values.dtype == torch.int64:
                raise TypeError("not whole numbers")  # a fraction is not rounded in silence
            return cls(keys, values)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BudgetError(
                f"a rank table is {{'keys': [L][Hkv], 'values': [L][Hkv]}} of whole numbers ({error})"
            ) from error


def elements_per_token(full: int, budget: float, *, exact_tokens: int = 0, context: int = CONTEXT) -> float:
    """The elements per token that compressed tokens may take so that a whole cache meets its budget.

    Args:
        full: elements per token of the full cache, ``2 L Hkv D``.
        budget: share of the full cache's bytes at equal precision, in (0, 1].
        exact_tokens: tokens that there is room for in full (sinks and window). They are paid for by the others.
        context: number of tokens at which the total has to be met.

    Raises:
        BudgetError: for a budget out of range, or one that the exact tokens alone use up.
    """
    if not 0 < budget <= 1:
        raise BudgetError(f"budget={budget:g} is out of range: a share of the full cache, above 0 and at most 1")
    if budget == 1 or not exact_tokens:
        return budget * full
    if context <= exact_tokens:
        raise BudgetError(f"context={context} must be longer than the {exact_tokens} exact tokens (sinks and window)")
    left = (budget * context - exact_tokens) / (context - exact_tokens) * full
    if left <= 0:
        raise BudgetError(
            f"budget={budget:g} is used up by {exact_tokens} exact tokens at {context} tokens: "
            "use fewer sinks, a smaller window or a longer context"
        )
    return left


def uniform(layers: int, heads: int, width: int, elements: float) -> RankTable:
    """Equal ranks for all heads; what is left below one step for all goes to values first, spread over the layers."""
    return table_of(uniform_steps(layers, heads, width), elements, width)


def uniform_steps(layers: int, heads: int, width: int) -> Steps:
    """The steps of equal ranks: heads are alike, so that no groups have to be made."""
    return _steps(uniform_gains(layers, heads, width), width, single_heads(layers, heads))


def uniform_gains(layers: int, heads: int, width: int) -> Tensor:
    """What steps are worth where all heads are alike, ``[2, L, Hkv, steps]``: only their order means something."""
    gains = -torch.arange(len(edges(width)) - 1, dtype=torch.float64).expand(2, layers, heads, -1)
    # A fixed order among equals that spreads over layers: the golden ratio's multiples modulo one.
    spread = (torch.arange(layers * heads, dtype=torch.float64) * 0.6180339887498949) % 1
    order = torch.stack((spread, 1 + spread)).reshape(2, layers, heads, 1) / 2
    return gains + order * 0.5


def halvable(share: float, width: int) -> float:
    """The share of the ranks, or the least that leaves heads of ``width`` something to halve if that is more."""
    return max(share, min(1.0, 2 * STEP / width))


def by_drop_cost(key_drop_cost: Tensor, value_drop_cost: Tensor, elements: float) -> RankTable:
    """The ranks that lose the least: the optimum of the additive model ``loss = sum of the costs of dropped ones``.

    Args:
        key_drop_cost, value_drop_cost: ``[L, Hkv, D]``, the loss expected from dropping each coordinate, in one unit.
        elements: elements per token that may be used.

    Raises:
        BudgetError: if ``elements`` is below the smallest table (one step everywhere), or a cost is not finite.
    """
    return by_gains(drop_cost_gains(key_drop_cost, value_drop_cost), elements, key_drop_cost.shape[-1])


def drop_cost_gains(key_drop_cost: Tensor, value_drop_cost: Tensor) -> Tensor:
    """The drop cost of each step per element, ``[2, L, Hkv, steps]``.

    Raises:
        BudgetError: if a cost is not finite.
    """
    drop_cost = torch.stack((key_drop_cost, value_drop_cost)).double()
    if not torch.isfinite(drop_cost).all():
        raise BudgetError("drop costs must be finite: calibrate the adapter again")
    return torch.stack([drop_cost[..., a:b].sum(-1) / (b - a) for a, b in pairwise(edges(drop_cost.shape[-1]))], -1)


def blended(gains: Tensor, share: float) -> Tensor:
    """Steps between the order of their ``gains`` and that of equal ranks, ``[2, L, Hkv, steps]``.

    A step's place in either order is the budget from which on it is taken. The blend goes by the weighted mean of both
    places, so that ranks are about the mean of both tables' at any budget.

    Args:
        share: of equal ranks, in [0, 1].
    """
    layers, heads, steps = gains.shape[1:]
    equal = uniform_gains(layers, heads, STEP * steps)
    return (1 - share) * _places(_decreasing(gains)) + share * _places(equal)


def _places(gains: Tensor) -> Tensor:
    """Minus the number of steps with larger gains."""
    order = gains.flatten().argsort(descending=True, stable=True)
    return -order.argsort().view_as(gains).double()


def by_gains(gains: Tensor, elements: float, width: int) -> RankTable:
    """The ranks of the steps with the largest gains, heads of a layer in at most `MAX_GROUPS` groups.

    Args:
        gains: ``[2, L, Hkv, steps]`` per element, for keys and values; a head takes its steps in order, so later ones
            never count for more than earlier ones.
        elements: elements per token that may be used.
        width: the head dimension.

    Raises:
        BudgetError: if ``elements`` is below the smallest table (one step everywhere).
    """
    return table_of(gain_steps(gains, width), elements, width)


def gain_steps(gains: Tensor, width: int) -> Steps:
    """The steps in order of their ``gains``, for heads of a layer in at most `MAX_GROUPS` groups; see `by_gains`."""
    gains = _decreasing(gains)
    return nested(lambda units: _steps(gains, width, units), *gains.shape[1:3])


def table_of(steps: Steps, elements: float, width: int) -> RankTable:
    """The rank table of some elements per token.

    Raises:
        BudgetError: if they are fewer than the smallest table takes.
    """
    table = steps.table(elements)
    if table is None:
        full = steps.start.numel() * width
        raise BudgetError(
            f"elements={elements:g}, that is {elements / full:.4f} of the full cache and below the smallest possible, "
            f"{steps.least / full:.4f} ({edges(width)[1]} of {width} coordinates in every head): "
            f"give at least elements={steps.least:g}"
        )
    return RankTable(table[0], table[1])


def edges(width: int) -> list[int]:
    """Ranks a head can take: multiples of `STEP`, and the full width."""
    return [*range(0, width, STEP), width]


def single_heads(layers: int, heads: int) -> Units:
    """The units of a model whose heads move by themselves."""
    return [[[head] for head in range(heads)] for _ in range(layers)]


def nested(make: Callable[[Units], Steps], layers: int, heads: int) -> Steps:
    """Steps of single heads; in models with more than `MAX_GROUPS` KV heads, of groups, the same ones at any budget.

    Args:
        make: the steps for units of heads that move together, of tables ``[2, L, Hkv, ...]``.
    """
    single = make(single_heads(layers, heads))
    if heads <= MAX_GROUPS:
        return single
    tables = [single.table(single.least + share * (single.most - single.least)) for share in CLUSTERED_AT]
    sizes = torch.cat([t.reshape(2, layers, heads, -1).sum(-1).double() for t in tables if t is not None])
    return make([cluster(sizes[:, row].T) for row in range(layers)])


def _steps(gains: Tensor, width: int, units: Units) -> Steps:
    """Steps in order of gain per element: from one step in every rank to full ranks.

    Args:
        gains: ``[2, L, Hkv, steps]``, non-increasing along the steps of a head.
    """
    bounds, shape = edges(width), gains.shape[:3]
    found = []
    for layer, groups in enumerate(units):
        for unit in groups:
            unit_gains = gains[:, layer, unit].mean(1).tolist()
            for side in (0, 1):
                places = [(side * shape[1] + layer) * shape[2] + head for head in unit]
                for index in range(1, gains.shape[-1]):
                    cost = len(unit) * (bounds[index + 1] - bounds[index])
                    found.append((unit_gains[side][index], places, bounds[index + 1], cost))
    found.sort(key=lambda step: -step[0])
    start = torch.full(shape, bounds[1], dtype=torch.int64)
    return Steps.of(start, start.sum().item(), (step[1:] for step in found), any_start=True)


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


def cluster(sizes_of_heads: Tensor) -> list[list[int]]:
    """Merge heads of a layer, those of the nearest sizes ``[Hkv, n]`` first, until `MAX_GROUPS` groups are left."""
    groups = [[h] for h in range(len(sizes_of_heads))]
    while len(groups) > MAX_GROUPS:
        centres = torch.stack([sizes_of_heads[g].mean(0) for g in groups])
        sizes = torch.tensor([float(len(g)) for g in groups], dtype=torch.float64)
        merge_cost = torch.cdist(centres, centres).square() * (sizes[:, None] * sizes / (sizes[:, None] + sizes))
        merge_cost.fill_diagonal_(torch.inf)
        a, b = sorted(divmod(int(merge_cost.argmin()), len(groups)))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return groups
