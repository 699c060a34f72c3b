"""usearch: an HNSW graph of prefixes in fp16; the full vectors beside it rank what it finds."""

from typing import Any

import numpy as np

from nestling.embed.search.flat import PrefixIndex
from nestling.embed.search.plan import Plan
from nestling.integrations.libraries import library
from nestling.options import choice, whole

DTYPES = ("f32", "f16", "i8")


class UsearchIndex(PrefixIndex):
    """An index of usearch in memory.

    Args:
        plan, space: as of `Index`.
        dtype: ``"f32"``, ``"f16"`` or ``"i8"``.
        links: of a vector in the graph.
        effort: vectors that are looked at while the graph is built, and while it is searched for 64 candidates or
            fewer; for more, as many as there are candidates.

    Raises:
        MissingExtraError: usearch is not installed.
    """

    def __init__(self, plan: Plan, space: str | None = None, *, dtype: str = "f16", links: int = 16, effort: int = 80):
        super().__init__(plan, space)
        module = library("usearch.index", "usearch")
        self._index: Any = module.Index(
            ndim=plan.width, metric="ip", dtype=choice("dtype", dtype, DTYPES), connectivity=whole("links", links),
            expansion_add=whole("effort", effort), expansion_search=64,
        )  # fmt: skip

    def _add_prefixes(self, first: int, prefixes: np.ndarray) -> None:
        self._index.add(np.arange(first, first + len(prefixes)), prefixes)

    def _nearest(self, prefix: np.ndarray, count: int) -> np.ndarray:
        self._index.expansion_search = max(64, count)
        return self._index.search(prefix, count, threads=1).keys.astype(np.int64)

    def _forget(self, numbers: np.ndarray) -> None:
        self._index.remove(numbers)
