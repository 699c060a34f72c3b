"""Reverse water-filling: from what blocks lose at each number of bits to the bits of every block, for all budgets.

On the lower hull of what a block loses by its bits, every further bit gains less than the one before, so taking the
steps of all blocks in order of gain per bit is the optimum for every budget at once. A smaller budget takes the first
few of the same steps, in no block more than a larger one: that is what lets a cache in use be shrunk.

Groups: a layer stores its heads in at most `MAX_GROUPS` groups. In models with more KV heads, heads with similar sizes
are tied together, at every budget the same ones, and the steps are taken for the groups, at the group's cost. Where a
layer must have one rank, as for engines whose pages have one width, all its heads are one group, keys and values too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocation.budget import FULL_BITS, Budget, read_share
from nestling.kv.allocation.table import CHOICES, RANKS, Allocation, block_sizes
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK

MAX_GROUPS = 4
CLUSTERED_AT = (0.75, 0.5, 0.25)  # shares of the bits of all steps, at which heads are compared to be grouped
ROUNDING = 1e-6  # of a number of bits
DIGITS = 4  # of the smallest budget, which is rounded up

Unit = list[tuple[int, int]]  # sides and heads of a layer that move together: (0, head) are keys, (1, head) values


@dataclass(frozen=True)
class Steps:
    """The allocations of all budgets.

    Attributes:
        start: bits of blocks if no step is taken, int64 ``[2, L, Hkv, blocks]``.
        place, value: of the n steps: which element of the flattened table they raise, and to what.
        spent: fp64 ``[n]``, rising: bits per token of the start and all steps up to each.
        least: the fewest bits per token that there is an allocation for: of the start, or of the first step.
        width: of the heads.
    """

    start: Tensor
    place: Tensor
    value: Tensor
    spent: Tensor
    least: float
    width: int

    @classmethod
    def of(cls, start: Tensor, width: int, steps: Iterable[tuple[list[int], int, float]]) -> "Steps":
        """From steps in their order: the elements of the flattened ``start`` that each raises, to what, its bits."""
        places, values, spent = [], [], []
        total = first = float(Allocation(start[0], start[1], width).bits)
        for raised, value, bits in steps:
            total += bits
            first = first or total
            places += raised
            values += [value] * len(raised)
            spent += [total] * len(raised)
        return cls(
            start,
            torch.tensor(places, dtype=torch.int64),
            torch.tensor(values, dtype=torch.int64),
            torch.tensor(spent, dtype=torch.float64),
            first,
            width,
        )

    def table(self, bits: float) -> Tensor | None:
        """The bits of blocks, ``[2, L, Hkv, blocks]``, by all steps that fit into so many per token; None below
        `least`."""
        bits += ROUNDING
        if not bits >= self.least:
            return None
        count = int(torch.searchsorted(self.spent, bits, right=True))
        flat = self.start.flatten().scatter_reduce(0, self.place[:count], self.value[:count], "amax")
        return flat.view_as(self.start)

    def at(self, share: float) -> Allocation | None:
        """The allocation of a share of the bits of the full cache; None below `least`."""
        table = self.table(share * self.most)
        return None if table is None else Allocation(table[0], table[1], self.width)

    def required(self, budget: Budget) -> Allocation:
        """The allocation of a share that the user gave.

        Raises:
            BudgetError: if it is out of reach; the message has the smallest one that is not.
        """
        assert budget.share is not None
        if (allocation := self.at(budget.share)) is None:
            least = rounded_up(self.least / self.most, lambda share: self.at(share) is not None)
            raise BudgetError(f"{budget.given} is below the smallest possible, {least:.{DIGITS}g}")
        return allocation

    def tables(self, shares: Iterable[float]) -> Tensor:
        """The bits of blocks at some shares, ``[n, 2, L, Hkv, blocks]``.

        Raises:
            BudgetError: if one is out of reach.
        """
        return torch.stack([self.required(read_share(share)).stacked for share in shares])

    @property
    def most(self) -> float:
        """Bits per token of the largest table, the full cache's."""
        return float(self.spent[-1]) if len(self.spent) else self.least


def rounded_up(least: float, possible: Callable[[float], bool]) -> float:
    """The smallest share of `DIGITS` digits from ``least`` on that is possible; at most 1."""
    unit = 10.0 ** (math.floor(math.log10(least)) + 1 - DIGITS)
    count = math.ceil(least / unit - 1e-6)
    while (share := round(count * unit, 15)) < 1 and not possible(share):
        count += 1
    return min(share, 1.0)


def fill(lost: Tensor, width: int, *, grouped: bool = True, alike: bool = False) -> Steps:
    """The allocations of all budgets by what blocks lose at each of `CHOICES`, or of `RANKS`.

    Args:
        lost: ``[2, L, Hkv, blocks, choices]``, 0 at the last one.
        width: of the heads.
        grouped: tie heads together where a layer has more than `MAX_GROUPS`.
        alike: tie all heads of a layer together, keys and values as well.

    Raises:
        BudgetError: if a loss is not finite.
    """
    if not torch.isfinite(lost).all():
        raise BudgetError("costs must be finite: calibrate the adapter again")
    layers, heads = lost.shape[1:3]
    if alike:
        return _filled(lost, width, [[[(side, head) for side in (0, 1) for head in range(heads)]]] * layers)
    steps = _filled(lost, width, [_by_side([[head] for head in range(heads)])] * layers)
    if heads <= MAX_GROUPS or not grouped:
        return steps
    tables = [steps.table(steps.least + share * (steps.most - steps.least)) for share in CLUSTERED_AT]
    sizes = torch.cat([table.sum(-1).double() for table in tables if table is not None])
    return _filled(lost, width, [_by_side(cluster(sizes[:, row].T)) for row in range(layers)])


def _by_side(groups: Iterable[list[int]]) -> list[Unit]:
    """Groups of heads of a layer, whose keys move together, and whose values do."""
    return [[(side, head) for head in group] for group in groups for side in (0, 1)]


def _filled(lost: Tensor, width: int, units: Sequence[Sequence[Unit]]) -> Steps:
    """Steps in order of gain per bit, for the units of each layer. Among equals a head takes its blocks in order."""
    layers, heads, blocks, choices = lost.shape[1:]
    start = torch.zeros(lost.shape[:-1], dtype=torch.int64)
    ranks = choices == len(RANKS)
    if ranks:
        start[..., 0] = FULL_BITS
    sizes, steps = block_sizes(width).tolist(), []
    for layer, groups in enumerate(units):
        for unit in groups:
            sides, members = (list(part) for part in zip(*unit, strict=True))
            mean = lost[sides, layer, members].mean(0).tolist()
            most = math.inf  # that a block of ranks may gain, in spite of rounding
            for block in range(int(ranks), blocks):
                places = [((side * layers + layer) * heads + head) * blocks + block for side, head in unit]
                for gain, bits, cost in hull(mean[block], sizes[block]):
                    most = min(gain, most) if ranks else gain
                    steps.append((-most, (places, bits, cost * len(unit))))
    steps.sort(key=lambda step: step[0])  # which keeps the order of equals
    return Steps.of(start, width, (step for _, step in steps))


def hull(lost: Sequence[float], size: int = COORDINATES_PER_BLOCK) -> list[tuple[float, int, int]]:
    """Steps on the lower hull of a block's losses: (gain per bit, bits from there on, bits more per token).

    Args:
        lost: at each of `CHOICES`, or of `RANKS`.
        size: coordinates of the block. Codes are those of a whole block, so that of a small one not every width pays.
    """
    choices = CHOICES if len(lost) == len(CHOICES) else RANKS
    most = FULL_BITS * size
    points = [(bits * COORDINATES_PER_BLOCK, bits, loss) for bits, loss in zip(choices, lost, strict=True)]
    points = [point for point in points if point[0] < most] + [(most, FULL_BITS, lost[-1])]
    steps, at = [], 0
    while at < len(points) - 1:
        cost, _, loss = points[at]
        slopes = [((loss - points[to][2]) / (points[to][0] - cost), to) for to in range(at + 1, len(points))]
        gain, at = max(slopes)
        steps.append((gain, points[at][1], points[at][0] - cost))
    return steps


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
