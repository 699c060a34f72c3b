"""Readers of texts, pairs and sets to measure on, whose errors name file and line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestling.data.pairs import read_pairs, read_sts
    from nestling.data.retrieval import read_retrieval
    from nestling.data.texts import read_multiple_choice, read_texts

__all__ = ["read_multiple_choice", "read_pairs", "read_retrieval", "read_sts", "read_texts"]
_HOMES = {
    "read_multiple_choice": "texts", "read_pairs": "pairs", "read_retrieval": "retrieval", "read_sts": "pairs",
    "read_texts": "texts",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The readers, when they are first asked for: the command line shows its help without them."""
    if name in _HOMES:
        return getattr(import_module(f"nestling.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
