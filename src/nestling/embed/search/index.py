"""`Index`: what all indexes do: vectors are added and deleted by ids, and searched by a plan in one space."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nestling.embed.search.plan import Plan
from nestling.errors import SearchError
from nestling.files.reading import short
from nestling.options import shown, whole


class Hit(NamedTuple):
    """A result: the id of a vector, and its dot product with the query."""

    id: str
    score: float


class Index(ABC):
    """Vectors by id, in one space.

    Engines are its classes: they store vectors that a plan has turned, and find candidates by their prefix.

    Args:
        plan: of the vectors, by `choose_plan` or `Plan.full`.
        space: the id of the space that the vectors are in, such as ``encoder.space`` or ``vectors.spaces[size]``. Then
            `add` and the searches have to name it: what is of another space is refused. None: nobody asks.
    """

    def __init__(self, plan: Plan, space: str | None = None):
        self.plan, self.space = plan, space

    @abstractmethod
    def __len__(self) -> int:
        """How many vectors there are."""

    @abstractmethod
    def _add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Store turned vectors of new ids."""

    @abstractmethod
    def _search(self, query: np.ndarray, k: int, candidates: int) -> list[Hit]:
        """The best of the candidates that the prefix of a turned query ``[dims]`` finds."""

    @abstractmethod
    def _vectors(self, ids: Sequence[str]) -> np.ndarray:
        """The turned vectors of ids; KeyError for one that is not there."""

    @abstractmethod
    def _there(self, ids: Sequence[str]) -> str | None:
        """One of these ids that is in the index, if any is."""

    @abstractmethod
    def _delete(self, ids: Sequence[str]) -> None:
        """Forget ids; KeyError, and nothing is forgotten, where one is not there."""

    def add(self, ids: Sequence[str], vectors: Any, *, space: str | None = None) -> None:
        """Add vectors ``[n, >= dims]`` under ids that are not there yet.

        Raises:
            SearchError: the space is another one, an id is there already or twice, or shapes do not go together.
        """
        self._check_space(space)
        names = [_id(each) for each in ids]
        turned = self.plan.turned(vectors)
        if len(names) != len(turned):
            raise SearchError(f"{len(names)} ids for {len(turned)} vectors: expected as many")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SearchError(f"the id {short(twice)} is given twice: each vector needs one of its own")
        if (there := self._there(names)) is not None:
            raise SearchError(f"the id {short(there)} is in the index already: delete it first")
        if names:
            self._add(names, turned)

    def search(
        self, query: Any, k: int | None = None, *, space: str | None = None, candidates: int | None = None
    ) -> list[Hit]:
        """The ``k`` best vectors for a query ``[>= dims]``, best first; fewer where there are fewer.

        Args:
            query: of any size of the space that is as wide as the index, or wider.
            k: by default the plan's.
            space: of the query.
            candidates: by default the plan's, and ``k`` at least.

        Raises:
            SearchError: the space is another one, or the query is narrower than the index.
        """
        self._check_space(space)
        wanted = self.plan.k if k is None else whole("k", k)
        count = max(wanted, self.plan.candidates if candidates is None else whole("candidates", candidates))
        return self._search(self._turned(query), wanted, count)

    def rerank(self, query: Any, ids: Sequence[str], k: int | None = None, *, space: str | None = None) -> list[Hit]:
        """Ids that something else has found, such as a text search, by their full vectors; the best ``k`` or all.

        Raises:
            SearchError: an id is not there, the space is another one, or the query is narrower than the index.
        """
        self._check_space(space)
        names = [_id(each) for each in ids]
        scores = self._named(self._vectors, names) @ self._turned(query) if names else np.empty(0)
        order = np.argsort(-scores, kind="stable")[: None if k is None else whole("k", k)]
        return [Hit(names[place], float(scores[place])) for place in order]

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors by their ids, all or none.

        Raises:
            SearchError: an id is not there.
        """
        if names := list(dict.fromkeys(map(_id, ids))):
            self._named(self._delete, names)

    def _named(self, call: Any, names: Sequence[str]) -> Any:
        try:
            return call(names)
        except KeyError as error:
            raise SearchError(f"the id {short(error.args[0])} is not in the index: add it first") from error

    def _turned(self, query: Any) -> np.ndarray:
        vector = np.asarray(query, dtype=np.float32)
        if vector.ndim != 1:
            raise SearchError(f"a query of shape {vector.shape}: expected one vector of at least {self.plan.dims}")
        return self.plan.turned(vector[None])[0]

    def _check_space(self, space: str | None) -> None:
        if self.space is not None and space != self.space:
            raise SearchError(
                f"space={shown(space)}, and the index is in {self.space}: vectors of the two cannot be compared; "
                "encode with the adapter that the index was made with, or make the index anew"
            )


def _id(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise SearchError(f"the id {short(value)} is no text: expected names such as 'doc-7'")
    return value
