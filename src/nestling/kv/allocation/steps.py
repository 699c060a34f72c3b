"""Nested allocations: steps in the order in which they are worth taking, of which every budget takes the first few.

So a table at a smaller budget is nowhere above one at a larger budget, which is what lets a cache in use be shrunk.
Once the steps are in order, the table of any budget is a look-up.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-9  # of an amount


@dataclass(frozen=True)
class Steps:
    """An allocation for every amount.

    Attributes:
        start: the table if no step is taken, int64.
        place, value: of the n steps: which element of the flattened table they raise, and to what.
        spent: fp64 ``[n]``, rising: what the start and all steps up to each cost.
        least: the smallest amount that there is a table for.
    """

    start: Tensor
    place: Tensor
    value: Tensor
    spent: Tensor
    least: float

    @classmethod
    def of(
        cls, start: Tensor, cost: float, steps: Iterable[tuple[list[int], int, float]], *, any_start: bool
    ) -> "Steps":
        """From steps in their order: the elements of the flattened ``start`` that each raises, to what, and its cost.

        Args:
            cost: of ``start``.
            any_start: whether ``start`` itself is a table that can be used; else at least one step is taken.
        """
        places, values, spent, total = [], [], [], cost
        for raised, value, more in steps:
            total += more
            places += raised
            values += [value] * len(raised)
            spent += [total] * len(raised)
        least = cost if any_start else next(iter(spent), torch.inf)
        return cls(
            start,
            torch.tensor(places, dtype=torch.int64),
            torch.tensor(values, dtype=torch.int64),
            torch.tensor(spent, dtype=torch.float64),
            least,
        )

    def table(self, amount: float) -> Tensor | None:
        """The table of all steps that fit into an amount; None below `least`."""
        amount += ROUNDING
        if not amount >= self.least:
            return None
        count = int(torch.searchsorted(self.spent, amount, right=True))
        flat = self.start.flatten().scatter_reduce(0, self.place[:count], self.value[:count], "amax")
        return flat.view_as(self.start)

    @property
    def most(self) -> float:
        """What the largest table costs."""
        return float(self.spent[-1]) if len(self.spent) else self.least
