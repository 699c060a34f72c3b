"""From an adapter and a budget to a table, and what a cache was made of: enough to find the table of any budget."""

import math
from typing import TYPE_CHECKING, Any

import torch

from nestling.errors import AdapterError, BudgetError
from nestling.kv.allocation.allocate import WITHOUT_BITS, steps_of
from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.budget import Budget, read_budget, read_limit, read_share
from nestling.kv.allocation.ranks import RankTable, elements_per_token
from nestling.kv.cache.config import BUDGET, CacheConfig
from nestling.kv.cache.exact import capacity

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

DIGITS = 4  # of the smallest budget, which is rounded up


def ranks_at(adapter: "KVAdapter", budget: Any, allocation: str | None = None) -> RankTable:
    """The rank table of a share of the full cache, exact tokens not counted.

    Args:
        budget: see `nestling.kv.allocation.budget.read_share`.

    Raises:
        BudgetError: if it is no share, or below the smallest, which the message has; for unknown allocations.
    """
    table = _table_at(adapter, CacheConfig.paper(read_share(budget), allocation=allocation))
    assert isinstance(table, RankTable)
    return table


def bits_at(adapter: "KVAdapter", budget: Any) -> BitTable:
    """The bit table of a share of the 16 bits of the full cache: as `ranks_at`.

    Raises:
        BudgetError: as `ranks_at`.
        AdapterError: for an adapter that was made without quantisation costs.
    """
    if not adapter.quantises:
        raise AdapterError(WITHOUT_BITS)
    table = _table_at(adapter, CacheConfig.paper(read_share(budget), quantise=True))
    assert isinstance(table, BitTable)
    return table


def _table_at(adapter: "KVAdapter", config: CacheConfig) -> RankTable | BitTable:
    factory = CacheFactory(adapter, config, advise=False)
    return factory.required(factory.budget)


def read_request(config: CacheConfig) -> tuple[Budget, Budget | None]:
    """The budget that a cache starts from, a share, and the bytes that it never exceeds, if there are any.

    Raises:
        BudgetError: if two limits are given.
    """
    asked = None if config.budget is None else read_budget(config.budget)
    limit = None if config.limit is None else read_limit(config.limit)
    if asked is not None and asked.limit is not None:
        if limit is not None:
            raise BudgetError(f"{asked.given} and {limit.given} are both limits in bytes: give one")
        asked, limit = None, asked
    if asked is None:
        asked = read_share(BUDGET if limit is None else 1.0)
    return asked, limit


def given_table(adapter: "KVAdapter", options: CacheConfig) -> RankTable | BitTable:
    """An allocation that the user gave in place of a budget.

    Raises:
        BudgetError: if it does not fit the adapter, or if there is another budget beside it.
    """
    for name in ("limit", "allocation"):
        if getattr(options, name) is not None:
            raise BudgetError(f"{name}={getattr(options, name)!r}: an allocation is a budget by itself, leave it out")
    table = options.budget
    return adapter.bits(1, table) if isinstance(table, BitTable) else adapter.ranks(1, table)


class CacheFactory:
    """The adapter, allocation and budget of a cache: plain data, which copies of the cache share.

    Args:
        adapter: whose bases the cache has.
        config: its budget is no allocation.
        advise: whether ``quantise=True`` may be advised where it would allow smaller budgets.

    Attributes:
        budget: that the cache starts from, a share.
        limit: bytes that it never exceeds, if there are any.
        quantised: whether coordinates are: where they can be, and no allocation of ranks is named.
    """

    def __init__(self, adapter: "KVAdapter", config: CacheConfig, *, advise: bool = True):
        self.adapter, self.context = adapter, config.context
        self.budget, self.limit = read_request(config)
        self.exact_tokens = capacity(config.sinks, config.window)
        self.share = self.budget.share or 1.0
        self.full = adapter.full_elements
        can = adapter.quantises and config.allocation in (None, "energy")
        self.quantised = can and config.quantise
        self.advise = advise and can and not config.quantise
        self.steps = steps_of(adapter, config.allocation, bits=self.quantised)
        self.smallest = self._smallest()

    def __deepcopy__(self, memo) -> "CacheFactory":
        return self

    def table(self, share: float) -> RankTable | BitTable | None:
        """The table of a budget; None below `smallest`."""
        try:
            elements = elements_per_token(self.full, share, exact_tokens=self.exact_tokens, context=self.context)
        except BudgetError:
            return None
        table = self.steps.table(16 * elements if self.quantised else elements)
        if table is None:
            return None
        if not self.quantised:
            return RankTable(*table)
        return BitTable(*(torch.full_like(table, 16) if share >= 1 else table))  # at 1 also what seems worth nothing

    def required(self, budget: Budget) -> RankTable | BitTable:
        """The table of a budget that the user gave.

        Raises:
            BudgetError: if it is out of reach; the message has the smallest one that is not.
        """
        assert budget.share is not None
        table = self.table(budget.share)
        if table is None:
            raise BudgetError(f"{budget.given} is below the smallest possible, {self._least()}")
        return table

    def _least(self) -> str:
        """The smallest budget, why it is not smaller, and what would make it so."""
        least = f"{self.smallest:.{DIGITS}g}"
        fits = self.context > self.exact_tokens
        ways = ["quantise=True"] if self.advise and fits else []
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
        return self.steps.least / (16 if self.quantised else 1) / self.full

    def _smallest(self) -> float:
        """The smallest budget, rounded up to `DIGITS` digits; at most 1."""
        least, exact = self._bare, self.exact_tokens
        if exact:
            least = (least * (self.context - exact) + exact) / self.context if self.context > exact else 1.0
        unit = 10.0 ** (math.floor(math.log10(least)) + 1 - DIGITS)
        count = math.ceil(least / unit - 1e-6)
        while (share := round(count * unit, 15)) < 1 and self.table(share) is None:
            count += 1
        return min(share, 1.0)
