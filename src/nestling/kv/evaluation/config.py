"""Options of measurements. torch is not imported, so that a command shows them quickly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.kv.allocation.budget import SINKS, Budget, read_shares
from nestling.options import choice, flag, natural, shown, whole, wholes

DTYPES = ("bfloat16", "float16", "float32", "float64")


def _tasks(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={shown(value)}: expected questions by the name of their task")
    return dict(value)


def _shares(name: str, value: Any) -> list[Budget]:
    return read_shares(value, name)


def _dtype(name: str, value: Any) -> str:
    return choice(name, str(value).removeprefix("torch."), DTYPES)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """What `nestling.kv.evaluate` measures, and of which caches; `nestling.kv.compare` goes by the measurements alone.

    Prompts are read compressed: what is measured is what a decode reads. Budgets are met at ``length`` tokens unless
    ``context`` says otherwise.
    """

    windows: int = option(8, "Windows of text to read; 0 leaves out KL, perplexity and agreement.", natural)
    length: int = option(1024, "Tokens per window, at most what the model's positions allow.", whole)
    chunk: int = option(
        64, "Tokens that go through a cache at once; an exact window looks worse in large chunks.", whole
    )
    tasks: Any = option(
        None, "Multiple-choice questions by task, as `read_multiple_choice` reads them.", _tasks, cli=False
    )
    passkey: Any = option(
        (), "Prompt length of a passkey test, in tokens; may be repeated.", wholes, cli=list[int] | None
    )
    budgets: Any = option(
        "100,50,25,12.5",
        "Shares such as 0.25, 25 or 25%, separated by commas.",
        _shares,
        cli=str,
    )
    allocation: Any = option(
        None,
        "energy, uniform, layer or a searched one, such as greedy; default: energy, or for ranks the last searched.",
        cli=str | None,
    )
    quantise: bool = option(
        True, "Store each coordinate at the width that pays, of 0 to 16 bits, where the adapter can.", flag
    )
    sinks: int = option(SINKS, "Leading tokens kept exact.", natural)
    window: int | None = option(
        None, "Recent tokens kept exact, at least; default: three tenths of the budget.", natural
    )
    exact_prompt: bool = option(False, "The first prompt attends to exact keys and values.", flag, cli=False)
    context: int | None = option(None, "Tokens at which budgets are met; default: the length.", whole, cli=False)
    dtype: Any = option(
        None,
        "Type of the stored cache: bfloat16, float16, float32 or float64; default: 16 bits, the model's or bfloat16.",
        _dtype,
        cli=str | None,
    )
