"""Budgets as users write them, in library and command line: ``0.25``, ``25``, ``"2.5bits"``, ``"64MiB"``."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nestling.errors import BudgetError, OptionError
from nestling.options import number, shown, whole

WRITTEN = re.compile(
    r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(%|bits?|[kmg]i?b|b)?\s*", re.ASCII | re.IGNORECASE
)
POWERS = {"k": 1, "m": 2, "g": 3}
UNITS = {"b": 1} | {f"{k}b": 1000**n for k, n in POWERS.items()} | {f"{k}ib": 1024**n for k, n in POWERS.items()}
FULL_BITS = 16  # per number of a full cache
EXPECTED_SHARE = (
    "a share of the full cache above 0 and at most 1, a percentage such as '25%', or bits per number such as '2.5bits'"
)
EXPECTED = f"{EXPECTED_SHARE}, or a limit in bytes such as '64MiB'"
EXPECTED_LIMIT = "bytes such as '64MiB', or a whole number of them"
SINKS, WINDOW = 4, 64  # exact tokens by default: no other choice buys as much quality for its bytes
CONTEXT = 1024  # tokens from which on budgets are met


@dataclass(frozen=True)
class Budget:
    """What a cache may take; of ``share`` and ``limit``, one is None.

    Attributes:
        share: of the full cache's bytes, above 0 and at most 1.
        limit: bytes that are never exceeded.
        given: the option and its value as the user wrote them, for messages: ``budget='25%'``.
    """

    share: float | None
    limit: int | None
    given: str


Budgets = str | Iterable[float | str | Budget]  # several, as `read_shares` takes them


def read_budget(value: Any, name: str = "budget") -> Budget:
    """A budget as the user wrote it: a number, or text.

    * A number, also as text, is a share of the full cache (``0.25``, ``1``) or, from 2 on, a percentage (``25``).
      Between 1 and 2 it may be meant as either, and is refused.
    * ``"25%"`` is a percentage; ``"2.5bits"`` are bits per number of the cache, of which a full one has 16.
    * ``"64MiB"`` is a limit in bytes, in one of the units B, kB, MB, GB, KiB, MiB, GiB.

    Args:
        value: what was given; a `Budget` is returned as it is.
        name: of the option, for messages.

    Raises:
        BudgetError: for anything else; the message has the value as it was given.
    """
    if isinstance(value, Budget):
        return value
    given = f"{name}={shown(value)}"
    if not isinstance(value, str):
        return Budget(_share(value, given), None, given)
    if not (match := WRITTEN.fullmatch(value)):
        raise BudgetError(f"{given} cannot be read: expected {EXPECTED}")
    amount, unit = float(match[1]), (match[2] or "").lower()
    if unit in UNITS:
        if not 1 <= amount * UNITS[unit] < 2**63:
            raise BudgetError(f"{given} is out of range: a limit is at least 1 byte, and below 2^63")
        return Budget(None, int(amount * UNITS[unit]), given)
    if unit:
        return Budget(_in_range(amount / (100 if unit == "%" else FULL_BITS), given), None, given)
    return Budget(_share(amount, given), None, given)


def read_share(value: Any, name: str = "budget") -> Budget:
    """A budget that is a share: as `read_budget`, where a limit in bytes is refused.

    Raises:
        BudgetError: as `read_budget`, and for bytes.
    """
    budget = read_budget(value, name)
    if budget.share is None:
        raise BudgetError(f"{budget.given} is a limit in bytes: expected {EXPECTED_SHARE}")
    return budget


def read_shares(values: Any, name: str = "budgets") -> list[Budget]:
    """Several shares: an iterable of them, or text with commas between them (``"100%,0.5,25"``).

    Raises:
        BudgetError: if one of them is no share, if two are the same share, or if there are none.
    """
    if isinstance(values, str):
        values = values.split(",")
    if not isinstance(values, Iterable):
        raise BudgetError(f"{name}={shown(values)}: expected several budgets, such as [0.5, 0.25] or '50%,25%'")
    budgets = [read_share(value, name) for value in values]
    shares = [budget.share for budget in budgets]
    if repeated := [budget.given for budget in budgets if shares.count(budget.share) > 1]:
        raise BudgetError(f"{' and '.join(repeated)} are the same budget: name each once")
    if not budgets:
        raise BudgetError(f"{name} are empty: expected several budgets, such as [0.5, 0.25] or '50%,25%'")
    return budgets


def read_limit(value: Any, name: str = "limit") -> Budget:
    """A limit in bytes: text with a unit, as for `read_budget`, or a whole number of bytes.

    Raises:
        BudgetError: for anything else; the message has the value as it was given.
    """
    given = f"{name}={shown(value)}"
    if isinstance(value, str | Budget):
        limit = read_budget(value, name)
    else:
        try:
            limit = Budget(None, whole(name, value, maximum=2**63 - 1), given)
        except OptionError as error:
            raise BudgetError(f"{given}: expected {EXPECTED_LIMIT}") from error
    if limit.limit is None:
        raise BudgetError(f"{limit.given} is no limit: expected {EXPECTED_LIMIT}")
    return limit


def share_left(share: float, *, exact_tokens: float = 0, cost: float | None = None, context: int = CONTEXT) -> float:
    """The share of their full size that compressed tokens may take so that a whole cache meets its budget.

    Args:
        share: of the full cache's bytes at equal precision, in (0, 1].
        exact_tokens: tokens that there is room for at full width (sinks and window). They are paid for by the others.
        cost: what they take, in tokens of the full cache; by default as many.
        context: number of tokens at which the total has to be met.

    Raises:
        BudgetError: for a share out of range, or one that the exact tokens alone use up.
    """
    if not 0 < share <= 1:
        raise BudgetError(f"budget={share:g} is out of range: a share of the full cache, above 0 and at most 1")
    if share == 1 or not exact_tokens:
        return share
    if context <= exact_tokens:
        exact = f"the {exact_tokens:.0f} exact tokens (sinks and window)"
        raise BudgetError(f"context={context} must be longer than {exact}")
    left = (share * context - (exact_tokens if cost is None else cost)) / (context - exact_tokens)
    if left <= 0:
        raise BudgetError(
            f"budget={share:g} is used up by {exact_tokens:.0f} exact tokens at {context} tokens: "
            "use fewer sinks, a smaller window or a longer context"
        )
    return left


def _number(value: Any) -> float:
    try:
        return number("budget", value)
    except OptionError:
        return math.nan


def _share(value: Any, given: str) -> float:
    amount = _number(value)
    if 1 < amount < 2:
        raise BudgetError(f"{given} is out of range, more than the full cache: as a percentage, write '{amount:g}%'")
    return _in_range(amount / 100 if amount >= 2 else amount, given)


def _in_range(share: float, given: str) -> float:
    if not 0 < share <= 1:
        raise BudgetError(f"{given} is out of range: expected {EXPECTED_SHARE}")
    return share
