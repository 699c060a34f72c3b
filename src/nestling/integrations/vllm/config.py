"""What `--additional-config` says of nestling, and the cache of nestling's own that it amounts to."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.kv.allocation.allocate import LAYER
from nestling.kv.allocation.budget import WINDOW, read_share
from nestling.kv.cache.config import CacheConfig
from nestling.options import shown, text, whole

KEY = "nestling"  # in vLLM's additional configuration
EXAMPLE = '{"nestling": {"adapter": "smollm2", "budget": "50%"}}'


def _share(name: str, value: Any) -> Any:
    """A share as it was written, so that messages have it."""
    read_share(value, name)
    return value


@dataclass(frozen=True, kw_only=True)
class PluginConfig(Config):
    """The options of a nested cache in vLLM.

    Raises:
        OptionError: an option has a value or a type that it cannot have.
    """

    adapter: str = option("", "The adapter of the model: a folder, a hub id, or 'smollm2'.", text)
    budget: Any = option(
        "50%", "Share of vLLM's own cache for a request of the greatest length, such as 0.5 or '50%'.", _share
    )
    window: int = option(WINDOW, "Recent tokens, and up to 15 more, that are kept exact.", whole)

    @classmethod
    def read(cls, additional: Any) -> "PluginConfig | None":
        """From vLLM's additional configuration; None where that says nothing of nestling.

        Raises:
            OptionError: it has other options, or values that they cannot have.
        """
        if not isinstance(additional, Mapping) or KEY not in additional:
            return None
        options = additional[KEY]
        if not isinstance(options, Mapping):
            raise OptionError(f"additional_config: {KEY}={shown(options)}: expected options, such as {EXAMPLE}")
        known = [option_.name for option_ in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise OptionError(
                f"additional_config: {KEY} has {shown(unknown[0])}, which is unknown: expected {', '.join(known)}"
            )
        if not options.get("adapter"):
            raise OptionError(f"additional_config: {KEY} has no adapter: expected one, such as {EXAMPLE}")
        return cls(**options)


def cache_config(config: PluginConfig, max_model_len: int) -> CacheConfig:
    """The options of the `nestling.kv.NestedCache` that reads texts as vLLM does, with the same allocation.

    Args:
        max_model_len: vLLM's, the length of a request at which the budget is met.

    Raises:
        OptionError: no such cache can be.
    """
    return CacheConfig(
        budget=config.budget,
        allocation=LAYER,
        quantise=False,
        window=config.window,
        context=max_model_len,
        exact_prompt=False,
    )
