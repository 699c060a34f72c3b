"""What a cache was made of: enough to find the table of any other budget, and the smallest one, without a cache."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocate import RankTable, elements_per_token
from nestling.kv.bits import BitTable
from nestling.kv.budget import Budget

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

DIGITS = 4  # of the smallest budget, which is rounded up


class Maker:
    """The adapter, allocation and budget of a cache: plain data, which copies of the cache share.

    Args:
        adapter: whose bases the cache has.
        budget: that the cache starts from, a share.
        limit: bytes that it never exceeds, if there are any.
        allocation: the name of one, as for `KVAdapter.steps`.
        bits: whether coordinates are quantised.
        exact_tokens: tokens that there is room for in full.
        context: number of tokens at which budgets are met.
        dtype: of the stored coordinates; None for that of the model.
    """

    def __init__(
        self,
        adapter: "KVAdapter",
        budget: Budget,
        limit: Budget | None = None,
        *,
        allocation: str | None,
        bits: bool,
        exact_tokens: int,
        context: int,
        dtype: torch.dtype | None,
    ):
        self.adapter, self.budget, self.limit, self.bits = adapter, budget, limit, bits
        self.exact_tokens, self.context = exact_tokens, context
        self.share = budget.share or 1.0
        self.full = adapter.full_elements
        self.steps = adapter.steps(allocation, bits=bits)
        self.smallest = self._smallest()
        quantisable = adapter.quantises and allocation in (None, "energy") and (dtype is None or dtype.itemsize == 2)
        self.bits_help = quantisable and not bits

    def __deepcopy__(self, memo) -> "Maker":
        return self

    def table(self, share: float) -> RankTable | BitTable | None:
        """The table of a budget; None below `smallest`."""
        try:
            elements = elements_per_token(self.full, share, None, exact_tokens=self.exact_tokens, context=self.context)
        except BudgetError:
            return None
        table = self.steps.table(16 * elements if self.bits else elements)
        if table is None:
            return None
        return BitTable(*table) if self.bits else RankTable(*table)

    def required(self, budget: Budget) -> RankTable | BitTable:
        """The table of a budget that the user gave.

        Raises:
            BudgetError: if it is out of reach; the message has the smallest one that is not.
        """
        assert budget.share is not None
        table = self.table(budget.share)
        if table is None:
            raise BudgetError(f"{budget.given} is below the smallest possible, {self._least(budget)}")
        return table

    def bases(self, row: int, device: torch.device) -> dict[str, Tensor]:
        """The bases of a compressed layer, by its row in the adapter."""
        return {name: tensor.to(device) for name, tensor in self.adapter._layer_bases(row).items()}

    def _least(self, budget: Budget) -> str:
        """The smallest budget in the unit of another one, why it is not smaller, and what would make it so."""
        if budget.full_bytes is not None:
            least = f"{round(self._smallest(1 / budget.full_bytes) * budget.full_bytes)} bytes"
        else:
            least = f"{self.smallest:.{DIGITS}g}"
        fits = self.context > self.exact_tokens
        ways = ["bits=True"] if self.bits_help and fits else []
        if self.exact_tokens and self._bare < 1:
            ways = ["fewer exact tokens", "a longer context", *ways]
            if fits:
                least += f" with {self.exact_tokens} exact tokens (sinks and window) at context={self.context}"
            else:
                exact = f"the {self.exact_tokens} exact tokens (sinks and window)"
                least += f": for less, context={self.context} must be longer than {exact}"
        return least + (f". Smaller ones are possible with {', or '.join(ways)}" if ways else "")

    @property
    def _bare(self) -> float:
        """The share of the full cache that the smallest table takes, exact tokens not counted."""
        return self.steps.least / (16 if self.bits else 1) / self.full

    def _smallest(self, unit: float | None = None) -> float:
        """The smallest budget, rounded up to a multiple of ``unit``, by default to `DIGITS` digits; at most 1."""
        least, exact = self._bare, self.exact_tokens
        if exact:
            least = (least * (self.context - exact) + exact) / self.context if self.context > exact else 1.0
        unit = unit or 10.0 ** (math.floor(math.log10(least)) + 1 - DIGITS)
        count = math.ceil(least / unit - 1e-6)
        while (found := round(count * unit, 15)) < 1 and self.table(found) is None:
            count += 1
        return min(found, 1.0)
