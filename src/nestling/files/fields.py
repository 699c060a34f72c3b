"""Values of a JSON object that was read from a file, each of the type and in the range that is expected of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nestling.errors import NestlingError
from nestling.files.reading import short

REQUIRED: Any = object()
LONGEST = 2**53  # whole numbers beyond are no exact floats


class Fields:
    """A JSON object, and where it is: ``"FILE"`` or ``"FILE: 'key'"``.

    Each getter gives the value of a key, or ``default`` where the key is missing or null and there is a default.

    Raises:
        error: by each getter, for a value that is missing or not as asked for. File and key are named.
    """

    def __init__(self, where: Any, values: Any, error: type[NestlingError]):
        self.where, self.error = str(where), error
        if not isinstance(values, Mapping):
            raise error(f"{where} must be an object, got {short(values)}")
        self.values: Mapping[str, Any] = values

    def whole(self, key: str, minimum: int = 0, maximum: int = LONGEST, default: Any = REQUIRED) -> int:
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._unlike(key, f"a whole number from {minimum} to {maximum}", value)
        return value

    def number(
        self, key: str, minimum: float = -math.inf, maximum: float = math.inf, default: Any = REQUIRED
    ) -> float:
        value = self._value(key, default)
        if value is default:
            return value
        if not is_number(value) or not minimum <= value <= maximum:
            bounds = "" if math.isinf(minimum) and math.isinf(maximum) else f" from {minimum:g} to {maximum:g}"
            raise self._unlike(key, f"a finite number{bounds}", value)
        return value

    def text(self, key: str, known: Collection[str] | None = None, default: Any = REQUIRED) -> str:
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or (known is not None and value not in known):
            raise self._unlike(key, "a text" if known is None else f"one of {', '.join(known)}", value)
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self._unlike(key, "true or false", value)
        return value

    def array(self, key: str, length: int | None = None, default: Any = REQUIRED) -> list[Any]:
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self._unlike(key, "a list" if length is None else f"a list of {length}", value)
        return value

    def numbers(self, key: str, length: int | None = None, minimum: float = -math.inf) -> list[float]:
        """A list of finite numbers."""
        value = self.array(key, length)
        if not all(is_number(item) and item >= minimum for item in value):
            at_least = "" if math.isinf(minimum) else f" of at least {minimum:g}"
            raise self._unlike(key, f"a list of finite numbers{at_least}", value)
        return value

    def object(self, key: str, default: Any = REQUIRED) -> Fields:
        value = self._value(key, default)
        return value if value is default else Fields(f"{self.where}: '{key}'", value, self.error)

    def objects(self, key: str, default: Any = REQUIRED) -> Iterator[Fields]:
        """The objects of a list."""
        for place, value in enumerate(self.array(key, default=default)):
            yield Fields(f"{self.where}: '{key}[{place}]'", value, self.error)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None or (key in self.values and default is REQUIRED):
            return value
        if default is REQUIRED:
            raise self.error(f"{self.where}: '{key}' is missing")
        return default

    def _unlike(self, key: str, expected: str, value: Any) -> NestlingError:
        return self.error(f"{self.where}: '{key}' must be {expected}, got {short(value)}")


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
