"""Budgets as users write them, in library and command line: ``0.25``, ``25``, ``"2.5bits"``, ``"64MiB"``."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nestling.errors import BudgetError, OptionError
from nestling.options import number, shown

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
SINKS, WINDOW = 4, 64  # exact tokens by default: no other choice buys as much quality for its bytes


@dataclass(frozen=True)
class Budget:
    """What a cache may take; of ``share`` and ``limit``, one is None.

    Attributes:
        share: of the full cache's bytes, above 0 and at most 1.
        limit: bytes that are never exceeded.
        given: the option and its value as the user wrote them, for messages: ``budget='25%'``.
        full_bytes: what the full cache takes per token, if the share was given as bytes per token.
    """

    share: float | None
    limit: int | None
    given: str
    full_bytes: int | None = None


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


def read_request(
    budget: Any, bytes_per_token: Any, limit_mib: Any, full_bytes: int
) -> tuple[Budget | None, Budget | None]:
    """What was asked of a cache in one of several ways: a share, and a limit in bytes; None where there is none.

    Args:
        budget: as for `read_budget`.
        bytes_per_token: a share as a number of bytes per token.
        limit_mib: a limit as a number of MiB.
        full_bytes: what the full cache takes per token.

    Raises:
        BudgetError: if something cannot be read, or is said twice.
        OptionError: for a limit that is no positive number.
    """
    asked = None if budget is None else read_budget(budget)
    limit = asked if asked is not None and asked.limit is not None else None
    wanted = asked if limit is None else None
    if limit_mib is not None:
        mib = number("limit_mib", limit_mib, above=0, below=2**40)
        if limit is not None:
            raise BudgetError(f"{limit.given} and limit_mib={shown(limit_mib)} are both limits in bytes: give one")
        limit = Budget(None, int(mib * 2**20), f"limit_mib={shown(limit_mib)}")
    if bytes_per_token is not None:
        given = f"bytes_per_token={shown(bytes_per_token)}"
        if wanted is not None:
            raise BudgetError(f"{wanted.given} and {given} are two budgets: give one of them, not both or neither")
        found = _number(bytes_per_token) / full_bytes
        if not 0 < found <= 1:
            raise BudgetError(f"{given} is out of range: expected more than 0, and the full cache takes {full_bytes}")
        wanted = Budget(found, None, given, full_bytes)
    return wanted, limit


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
