"""One validation for every option of library and command line: what a number, a size or a choice may be.

The command line gives its options to the library, which checks them here before anything is computed or written.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nestling.errors import OptionError

T = TypeVar("T")


def whole(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """``value`` as an integer from ``minimum`` to ``maximum``, both included.

    Integers of NumPy and floats without a fraction are taken; bool is not, since ``batch=True`` is a slip.

    Raises:
        OptionError: for other types, fractions, NaN, infinity, and values out of range.
    """
    expected = f"a whole number of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
    number_ = _plain(name, value, expected)
    if number_ != int(number_) or number_ < minimum or (maximum is not None and number_ > maximum):
        raise OptionError(f"{name}={shown(value)} is out of range: expected {expected}")
    return int(number_)


def natural(name: str, value: Any) -> int:
    """``value`` as an integer of at least 0; see `whole`."""
    return whole(name, value, minimum=0)


def by_name(name: str, value: Any, owner: str) -> dict[str, Any]:
    """``value`` as options by name, for ``owner``, which checks them itself.

    Raises:
        OptionError: it is not a mapping from strings.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise OptionError(f"{name}={shown(value)}: expected options of {owner} by name")
    return dict(value)


def wholes(name: str, values: Any, minimum: int = 1) -> list[int]:
    """Several integers of at least ``minimum``, as a list.

    Raises:
        OptionError: if it is not an iterable of them.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise OptionError(f"{name}={shown(values)}: expected several whole numbers, such as [{max(minimum, 512)}]")
    return [whole(name, value, minimum) for value in values]


def number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a finite float within the bounds given.

    Raises:
        OptionError: for other types, NaN, infinity, and values out of range.
    """
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (("at least", minimum), ("above", above), ("at most", maximum), ("below", below))
        if bound is not None
    ]
    expected = " ".join(["a finite number", *(" and ".join(bounds),) * bool(bounds)])
    try:
        number_ = float(_plain(name, value, expected))
    except OverflowError:
        raise OptionError(f"{name}={shown(value)} is out of range: expected {expected}") from None
    if (
        (minimum is not None and number_ < minimum)
        or (above is not None and number_ <= above)
        or (maximum is not None and number_ > maximum)
        or (below is not None and number_ >= below)
    ):
        raise OptionError(f"{name}={shown(value)} is out of range: expected {expected}")
    return number_


def share(name: str, value: Any) -> float:
    """``value`` as a share: above 0 and at most 1."""
    return number(name, value, above=0.0, maximum=1.0)


def flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool; ``bits=4`` is a misunderstanding that must not count as true.

    Raises:
        OptionError: for any other type.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name}={shown(value)}: expected True or False")
    return value


def text(name: str, value: Any) -> str:
    """``value`` if it is a string.

    Raises:
        OptionError: for any other type.
    """
    if not isinstance(value, str):
        raise OptionError(f"{name}={shown(value)}: expected a string")
    return value


def path(name: str, value: Any) -> Path:
    """``value`` as a path.

    Raises:
        OptionError: it is none, or empty.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise OptionError(f"{name}={shown(value)}: expected a path")
    return Path(value)


def choice(name: str, value: T, known: Collection[T]) -> T:
    """``value`` if it is one of those known.

    Raises:
        OptionError: for any other value; the message lists those known.
    """
    if not any(type(value) is type(item) and value == item for item in known):
        raise OptionError(f"{name}={shown(value)} is unknown: expected one of {', '.join(map(str, known))}")
    return value


def _plain(name: str, value: Any, expected: str) -> int | float:
    """A Python number of one element: not bool, not text, not NaN or infinite."""
    if isinstance(value, bool | str | bytes | complex) or value is None:
        raise OptionError(f"{name}={shown(value)}: expected {expected}")
    if not isinstance(value, int):
        try:
            value = value.item() if hasattr(value, "item") else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise OptionError(f"{name}={shown(value)}: expected {expected}") from None
        if isinstance(value, bool | complex) or not isinstance(value, int | float):
            raise OptionError(f"{name}={shown(value)}: expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{name}={shown(value)}: expected {expected}")
    return value


def shown(value: Any) -> str:
    """The value as a message shows it, on one short line: a number of thousands of digits cannot even be spelled."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:
        return "a number of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."
