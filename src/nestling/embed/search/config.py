"""Options of choosing a plan."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.options import natural, number, shown, whole, wholes

WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256)


def _widths(name: str, value: Any) -> tuple[int, ...]:
    found = tuple(sorted(set(wholes(name, value))))
    if not found:
        raise OptionError(f"{name}={shown(value)}: expected at least one width")
    return found


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Options of `choose_plan`.

    Attributes:
        recall: the share of the ``k`` best by the full vectors that must be among those returned, in the mean of
            queries.
        k: of how many results a search is for.
        queries: so many are sampled from the vectors where none are given; half of them choose, half measure.
        widths: of the prefix, that are tried; those as wide as the vectors are left out.
        seed: of the sample.
    """

    recall: float = option(0.99, "Share of the best that must be returned.", partial(number, above=0, below=1))
    k: int = option(10, "Results a query.", whole)
    queries: int = option(1000, "Queries that are sampled from the vectors.", partial(whole, minimum=20))
    widths: tuple[int, ...] = option(WIDTHS, "Widths of the prefix that are tried.", _widths, cli=False)
    seed: int = option(0, "Seed of the sample.", natural)
