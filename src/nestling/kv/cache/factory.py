"""From an adapter and a budget to an allocation, and what a cache was made of: enough for that of any budget."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nestling.errors import BudgetError
from nestling.kv.allocation.allocate import quantises, steps_of
from nestling.kv.allocation.budget import Budget, read_budget, read_limit, read_share, share_left
from nestling.kv.allocation.steps import DIGITS, rounded_up
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.config import BUDGET, CacheConfig
from nestling.kv.cache.exact import capacity, exact_nbytes

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter


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


def given_allocation(adapter: "KVAdapter", options: CacheConfig) -> Allocation:
    """An allocation that the user gave in place of a budget.

    Raises:
        BudgetError: if it does not fit the adapter, or if there is another budget beside it.
    """
    for name in ("limit", "allocation"):
        if getattr(options, name) is not None:
            raise BudgetError(f"{name}={getattr(options, name)!r}: an allocation is a budget by itself, leave it out")
    return adapter.allocate(options.budget)


def in_rows(adapter: "KVAdapter", options: CacheConfig, allocation: Allocation) -> bool:
    """Whether exact tokens are stored at 8 bits: where coordinates are quantised."""
    if isinstance(options.budget, Allocation | Mapping):
        return allocation.quantised
    return quantises(adapter, options.allocation, options.quantise)


class CacheFactory:
    """The adapter, allocation and budget of a cache: plain data, which copies of the cache share.

    Args:
        adapter: whose bases the cache has.
        config: its budget is no allocation.
        advise: whether ``quantise=True`` may be advised where it would allow smaller budgets.

    Attributes:
        budget: that the cache starts from, a share.
        limit: bytes that it never exceeds, if there are any.
    """

    def __init__(self, adapter: "KVAdapter", config: CacheConfig, *, advise: bool = True):
        self.adapter, self.context = adapter, config.context
        self.budget, self.limit = read_request(config)
        self.exact_tokens, self.sinks = capacity(config.sinks, config.window), config.sinks
        self.rows = quantises(adapter, config.allocation, config.quantise)
        self.share = self.budget.share or 1.0
        self.advise = advise and not config.quantise and quantises(adapter, config.allocation, True)
        self.steps = steps_of(adapter, config.allocation, quantise=config.quantise)
        self.smallest = self._smallest()

    def __deepcopy__(self, memo) -> "CacheFactory":
        return self

    def at(self, share: float) -> Allocation | None:
        """The allocation of a budget; None below `smallest`."""
        try:
            left = share_left(share, exact_tokens=self.exact_tokens, cost=self.exact_cost, context=self.context)
        except BudgetError:
            return None
        return self.steps.at(left)

    @property
    def exact_cost(self) -> float:
        """What the exact tokens take, in tokens of the full cache."""
        if not self.rows:
            return self.exact_tokens
        _, heads, width = self.adapter.shape
        sizes = [exact_nbytes(self.exact_tokens, self.sinks, heads, width, 2, rows) for rows in (True, False)]
        return self.exact_tokens * sizes[0] / sizes[1] if self.exact_tokens else 0.0

    def required(self, budget: Budget) -> Allocation:
        """The allocation of a budget that the user gave.

        Raises:
            BudgetError: if it is out of reach; the message has the smallest one that is not.
        """
        assert budget.share is not None
        allocation = self.at(budget.share)
        if allocation is None:
            raise BudgetError(f"{budget.given} is below the smallest possible, {self._least()}")
        return allocation

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
        """The share of the full cache that the smallest allocation takes, exact tokens not counted."""
        return self.steps.least / self.steps.most

    def _smallest(self) -> float:
        """The smallest budget, rounded up to `DIGITS` digits; at most 1."""
        least, exact = self._bare, self.exact_tokens
        if exact:
            spent = least * (self.context - exact) + self.exact_cost
            least = spent / self.context if self.context > exact else 1.0
        return rounded_up(least, lambda share: self.at(share) is not None)
