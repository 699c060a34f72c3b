"""From an adapter and a budget to an allocation, and what a cache was made of: enough for that of any budget."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from nestling.errors import BudgetError
from nestling.kv.allocation.allocate import quantises, steps_of
from nestling.kv.allocation.budget import FULL_BITS, Budget, read_budget, read_limit, read_share, share_left
from nestling.kv.allocation.steps import DIGITS, rounded_up
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.config import BUDGET, CacheConfig
from nestling.kv.cache.rule import exact_nbytes, places
from nestling.kv.cache.window import Window

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter


BISECTIONS = 20  # down to a millionth of the full cache


class Plan(NamedTuple):
    """What a cache starts with.

    Attributes:
        factory: from which it gets others, if it was given a budget and not an allocation.
        allocation: of its coordinates.
        window: of its exact tokens.
        rows: whether these are stored at 8 bits, as they are beside quantised coordinates.
    """

    factory: "CacheFactory | None"
    allocation: Allocation
    window: Window
    rows: bool


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


def planned(adapter: "KVAdapter", options: CacheConfig, *, advise: bool = True) -> Plan:
    """What a cache of these options starts with.

    Args:
        advise: see `CacheFactory`.

    Raises:
        BudgetError: the budget or allocation cannot be met; the message has the smallest budget that can.
    """
    if not isinstance(options.budget, Allocation | Mapping):
        factory = CacheFactory(adapter, options, advise=advise)
        return Plan(factory, factory.required(factory.budget), factory.window(factory.share), factory.rows)
    allocation = given_allocation(adapter, options)
    rows, share = allocation.quantised, allocation.bits / (FULL_BITS * adapter.full_elements)
    return Plan(None, allocation, _window(options, share, rows), rows)


def _window(options: CacheConfig, share: float, rows: bool) -> Window:
    """The recent tokens that are exact at a budget, where the user does not say."""
    if options.window is not None:
        return Window(options.window)
    return Window.of_budget(share, options.context, options.sinks, rows)


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
        self.rows = quantises(adapter, config.allocation, config.quantise)
        self.config, self.sinks = config, config.sinks
        self.share = self.budget.share or 1.0
        self.advise = advise and not config.quantise and quantises(adapter, config.allocation, True)
        self.steps = steps_of(adapter, config.allocation, quantise=config.quantise)
        self.smallest = self._smallest()

    def __deepcopy__(self, memo) -> "CacheFactory":
        return self

    def at(self, share: float) -> Allocation | None:
        """The allocation of a budget; None below `smallest`. It has no more of any block than that of a larger one."""
        left = self._shared_out(share)[1]
        return None if left is None else self.steps.at(left)

    def window(self, share: float) -> Window:
        """The recent tokens that are exact at a budget."""
        return self._shared_out(share)[0]

    def _shared_out(self, share: float) -> tuple[Window, float | None]:
        """What exact tokens have of a budget, and what they leave the others, as a share of their full size.

        Where the least that these need is more than is usually left, the window is the largest one that leaves it.
        """
        window = _window(self.config, share, self.rows)
        left = self._left(share, window)
        if self.config.window is not None or (left is not None and left >= self._bare):
            # Above a half exact tokens of 8 bits leave more than the budget: layers that lost nothing by that would
            # have 16 bits for all.
            return window, left if left is None or not window.share else min(left, share)
        low, high = 0.0, share
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            left = self._left(share, _window(self.config, middle, self.rows))
            low, high = (middle, high) if left is not None and left >= self._bare else (low, middle)
        window = _window(self.config, low, self.rows)
        left = self._left(share, window)
        return window, self._bare if left is not None and left >= self._bare else None

    def _left(self, share: float, window: Window) -> float | None:
        """The share of its full size that a token which is not exact may take; None if there is nothing left."""
        tokens = self._places(window)
        try:
            return share_left(share, exact_tokens=tokens, cost=self.exact_cost(tokens), context=self.context)
        except BudgetError:
            return None

    def exact_tokens(self, share: float) -> int:
        """Places for exact tokens at a budget, when the text has the length of the context."""
        return math.ceil(self._places(self.window(share)))

    def _places(self, window: Window) -> float:
        """The same, without rounding: of two budgets the larger one leaves more."""
        return places(self.sinks, window, self.context)

    def exact_cost(self, tokens: float) -> float:
        """What so many exact tokens take, in tokens of the full cache."""
        if not self.rows:
            return tokens
        _, heads, width = self.adapter.shape
        sizes = [exact_nbytes(tokens, self.sinks, heads, width, 2, rows) for rows in (True, False)]
        return tokens * sizes[0] / sizes[1] if tokens else 0.0

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
        least, tokens = f"{self.smallest:.{DIGITS}g}", self.exact_tokens(self.smallest)
        fits = self.context > tokens
        ways = ["quantise=True"] if self.advise and fits else []
        if tokens and self._bare < 1:
            ways = ["fewer exact tokens", "a longer context", *ways]
            if fits:
                least += f" with {tokens} exact tokens (sinks and window) at context={self.context}"
            else:
                exact = f"the {tokens} exact tokens (sinks and window)"
                least += f": for less, context={self.context} must be longer than {exact}"
        return least + (f". Smaller ones are possible with {', or '.join(ways)}" if ways else "")

    @property
    def _bare(self) -> float:
        """The share of the full cache that the smallest allocation takes, exact tokens not counted."""
        return self.steps.least / self.steps.most

    def _smallest(self) -> float:
        """The smallest budget, rounded up to `DIGITS` digits; at most 1."""
        low, high = self._bare, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.at(middle) is not None else (middle, high)
        return rounded_up(low, lambda share: self.at(share) is not None)
