"""Indexes in memory: candidates by a prefix, the full vectors beside it; `FlatIndex` needs nothing but torch."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nestling.embed.search.exact import best
from nestling.embed.search.index import Hit, Index
from nestling.embed.search.plan import Plan
from nestling.embed.search.prefix import PrefixTable

GROWTH = 1.5  # of the memory, when it is full


class PrefixIndex(Index):
    """Full vectors in fp32, in memory, which rank what an engine finds by their prefixes.

    An engine knows vectors by numbers, from 0 on; numbers of deleted ones are not used again.
    """

    def __init__(self, plan: Plan, space: str | None = None):
        super().__init__(plan, space)
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._full = np.empty((0, plan.dims), np.float32)

    @abstractmethod
    def _add_prefixes(self, first: int, prefixes: np.ndarray) -> None:
        """Store prefixes ``[n, width]`` under the numbers from ``first`` on."""

    @abstractmethod
    def _nearest(self, prefix: np.ndarray, count: int) -> np.ndarray:
        """Numbers of about so many vectors whose prefixes have the largest dot products with one ``[width]``."""

    @abstractmethod
    def _forget(self, numbers: np.ndarray) -> None:
        """Never return these numbers again."""

    def __len__(self) -> int:
        return len(self._numbers)

    def _add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        first = len(self._names)
        needed = first + len(ids)
        if needed > len(self._full):
            larger = np.empty((max(needed, int(GROWTH * len(self._full))), self.plan.dims), np.float32)
            larger[:first] = self._full[:first]
            self._full = larger
        self._full[first:needed] = vectors
        self._add_prefixes(first, np.ascontiguousarray(vectors[:, : self.plan.width]))
        self._names.extend(ids)
        self._numbers.update((name, first + place) for place, name in enumerate(ids))

    def _search(self, query: np.ndarray, k: int, candidates: int) -> list[Hit]:
        if not self._numbers:
            return []
        numbers = self._nearest(query[: self.plan.width], candidates)
        scores = self._full[numbers] @ query
        if k < len(numbers):
            chosen = np.argpartition(-scores, k)[:k]
            numbers, scores = numbers[chosen], scores[chosen]
        order = np.argsort(-scores, kind="stable")
        return [Hit(self._names[numbers[place]], float(scores[place])) for place in order]

    def _vectors(self, ids: Sequence[str]) -> np.ndarray:
        return self._full[[self._numbers[name] for name in ids]]

    def _there(self, ids: Sequence[str]) -> str | None:
        return next((name for name in ids if name in self._numbers), None)

    def _delete(self, ids: Sequence[str]) -> None:
        numbers = np.array([self._numbers[name] for name in ids])
        self._forget(numbers)
        for name in ids:
            del self._numbers[name]


class FlatIndex(PrefixIndex):
    """Prefixes in 8 bits, all of which are read for each query; of a full plan, the vectors themselves."""

    def __init__(self, plan: Plan, space: str | None = None):
        super().__init__(plan, space)
        self._table: PrefixTable | None = None
        self._dead = torch.empty(0, dtype=torch.bool)

    def _add_prefixes(self, first: int, prefixes: np.ndarray) -> None:
        self._dead = torch.cat([self._dead, torch.zeros(len(prefixes), dtype=torch.bool)])
        if self.plan.is_full:
            return
        if self._table is None:
            self._table = PrefixTable(prefixes)
        else:
            self._table.codes = torch.cat([self._table.codes, self._table.code(prefixes)])

    def _nearest(self, prefix: np.ndarray, count: int) -> np.ndarray:
        scores = self._scores(prefix)
        if len(self) < len(scores):
            scores.masked_fill_(self._dead, -torch.inf)
        return best(scores, min(count, len(self))).numpy()

    def _scores(self, prefix: np.ndarray) -> Tensor:
        if self._table is not None:
            return self._table.scores(prefix)
        return torch.from_numpy(self._full[: len(self._names)]).mv(torch.from_numpy(prefix))

    def _forget(self, numbers: np.ndarray) -> None:
        self._dead[torch.from_numpy(numbers)] = True
