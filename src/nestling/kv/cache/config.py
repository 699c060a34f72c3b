"""The options of a nested cache. torch is not imported, so that a command line can show them quickly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.kv.allocation.budget import CONTEXT, SINKS, Budget, read_budget, read_limit
from nestling.options import flag, natural, share, shown, text, whole

BUDGET = 0.25  # where neither a budget nor a limit is given
DTYPES = ("bfloat16", "float16", "float32", "float64")  # that a cache can store


def _budget(name: str, value: Any) -> Any:
    """A budget as it was written, a share as a float; or an allocation."""
    if not isinstance(value, str | int | float | Budget):
        from nestling.kv.allocation.table import Allocation

        if isinstance(value, Allocation | Mapping):
            return value
    budget = read_budget(value, name)
    return value if isinstance(value, str | Budget) else budget.share


def _limit(name: str, value: Any) -> Any:
    limit = read_limit(value, name)
    return value if isinstance(value, str | Budget) else limit.limit


def _dtype(name: str, value: Any) -> str:
    word = value if isinstance(value, str) else str(value).removeprefix("torch.")
    if word not in DTYPES:
        raise OptionError(f"{name}={shown(value)} is unknown: expected one of {', '.join(DTYPES)}")
    return word


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    """What a `NestedCache` holds of a text, and in how many bytes.

    A prompt that is read exact has the loss of the full model at every budget, as long as it is read in one call: to
    score a text, say ``exact_prompt=False``, or let `nestling.kv.evaluation.evaluate` read it in chunks.
    """

    budget: Any = option(
        None,
        "Share of the full cache of the compressed layers, such as 0.25 or 25%; bits per coordinate, such as 2.5bits; "
        "or bytes that are never exceeded, such as 64MiB. Default: a quarter, or all beneath a limit.",
        _budget,
        cli=str | None,
    )
    limit: Any = option(
        None,
        "Bytes that are never exceeded, such as 64MiB: the cache shrinks as the text grows.",
        _limit,
        cli=str | None,
    )
    allocation: str | None = option(
        None,
        "energy, uniform, layer (one rank a layer), or the name of a searched one; by default energy, for ranks the "
        "last searched.",
        text,
    )
    quantise: bool = option(
        True, "Store each coordinate at the width that pays, of 0 to 16 bits, where the adapter can.", flag
    )
    sinks: int = option(
        SINKS, "Leading tokens that are kept exact, or at twice 8 bits beside quantised ones.", natural
    )
    window: int | None = option(
        None,
        "Recent tokens, and up to 15 more, that are kept exact, or at 8 bits beside quantised ones. Default: three "
        "tenths of the budget, so that there are more of them the longer the text is.",
        natural,
    )
    exact_prompt: bool = option(
        True, "The first prompt attends to exact keys and values; only later reads see the compression.", flag
    )
    context: int = option(CONTEXT, "Number of tokens at which the budget is met, exact ones included.", whole)
    dtype: Any = option(
        None,
        "Type of stored coordinates: bfloat16, float16, float32 or float64. Default: the model's, or bfloat16 if that "
        "has more than 16 bits.",
        _dtype,
        cli=str | None,
    )
    keep_tokens: float = option(
        1.0,
        "Share of the tokens that is kept, those that were read most; the budget is that of all tokens, so both "
        "shares multiply. Attention weights are computed for it.",
        share,
    )

    @classmethod
    def paper(cls, budget: Any, **options: Any) -> Self:
        """Compress everything from token 0, as arXiv 2410.14731 does: ranks alone, no sinks, window or exact prompt.

        Args:
            budget: as for the class; ``options`` are the other ones.

        Raises:
            OptionError: an option has a value that it cannot have.
        """
        return cls(**{"quantise": False, "sinks": 0, "window": 0, "exact_prompt": False, "budget": budget, **options})
