"""Options as dataclasses: the name, default, help and check of each stand once, for library, command line and jobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from nestling.errors import OptionError
from nestling.options import shown

Check = Callable[[str, Any], Any]


def option(default: Any, help: str, check: Check | None = None, *, flags: Sequence[str] = (), cli: Any = None) -> Any:
    """A field of a `Config`.

    Args:
        default: its value where none is given. None means that the value follows from something else, as ``help``
            says, and is not checked.
        help: one sentence, for ``--help`` and readers of the class.
        check: ``check(name, value)`` gives the value as it is kept, or raises `OptionError`. See `nestling.options`.
        flags: its names on the command line, by default ``--name``.
        cli: its type on the command line where that is not its own; False leaves it out there.
    """
    return field(default=default, metadata={"help": help, "check": check, "flags": tuple(flags), "cli": cli})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that were checked when they were given.

    Raises:
        OptionError: an option has a value or a type that it cannot have.
    """

    def __post_init__(self):
        for option_ in fields(self):
            value, check = getattr(self, option_.name), option_.metadata.get("check")
            if check is not None and not (value is None and option_.default is None):
                object.__setattr__(self, option_.name, check(option_.name, value))

    @classmethod
    def of(cls, config: Self | None) -> Self:
        """``config``, or the defaults where it is None.

        Raises:
            OptionError: it is something else.
        """
        if config is None:
            return cls()
        if not isinstance(config, cls):
            raise OptionError(f"config={shown(config)}: expected a {cls.__name__}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options by name, as a job's identity and a result's ``info`` keep them."""
        return {option_.name: getattr(self, option_.name) for option_ in fields(self)}
