"""FAISS: prefixes in a flat index or an HNSW graph; the full vectors beside it rank what they find."""

from functools import partial
from typing import Any

import numpy as np

from nestling.embed.search.flat import PrefixIndex
from nestling.embed.search.plan import Plan
from nestling.integrations.libraries import library
from nestling.options import choice, whole

KINDS = ("flat", "hnsw")
_faiss = partial(library, "faiss", "faiss", "faiss-cpu")


class FaissIndex(PrefixIndex):
    """An index of FAISS in memory.

    Args:
        plan, space: as of `Index`.
        kind: ``"flat"``: all prefixes are read, in fp32; ``"hnsw"``: a graph of them.
        links: of a vector in the graph.
        effort: vectors that are looked at while the graph is built; while it is searched, as many as there are
            candidates, and 64 at least.

    Raises:
        MissingExtraError: FAISS is not installed.
    """

    def __init__(self, plan: Plan, space: str | None = None, *, kind: str = "flat", links: int = 16, effort: int = 80):
        super().__init__(plan, space)
        self._faiss: Any = _faiss()
        self.kind = choice("kind", kind, KINDS)
        if kind == "flat":
            self._index = self._faiss.IndexFlatIP(plan.width)
        else:
            self._index = self._faiss.IndexHNSWFlat(
                plan.width, whole("links", links), self._faiss.METRIC_INNER_PRODUCT
            )
            self._index.hnsw.efConstruction = whole("effort", effort)
        self._dead: list[int] = []

    def _add_prefixes(self, first: int, prefixes: np.ndarray) -> None:
        self._index.add(prefixes)

    def _nearest(self, prefix: np.ndarray, count: int) -> np.ndarray:
        options: dict[str, Any] = {}
        if self._dead:
            options["sel"] = self._faiss.IDSelectorNot(self._faiss.IDSelectorBatch(self._dead))
        if self.kind == "hnsw":
            options["efSearch"] = max(64, count)
            parameters = self._faiss.SearchParametersHNSW(**options)
        else:
            parameters = self._faiss.SearchParameters(**options) if options else None
        numbers = self._index.search(prefix[None], min(count, len(self)), params=parameters)[1][0]
        return numbers[numbers >= 0]

    def _forget(self, numbers: np.ndarray) -> None:
        self._dead.extend(map(int, numbers))
