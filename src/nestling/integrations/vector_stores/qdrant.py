"""Qdrant's own engine in this process (qdrant-edge): prefix and full vector are named vectors of one point.

A search is one call: the prefix fetches candidates, the full vector ranks them. A Qdrant server takes the same query,
``prefetch`` by ``prefix`` and then ``query`` by ``full``.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from nestling.embed.search.index import Hit, Index
from nestling.embed.search.plan import Plan
from nestling.errors import SearchError
from nestling.files.reading import read_object
from nestling.files.writing import write_file
from nestling.integrations.libraries import library
from nestling.options import whole

ABOUT = "nestling.json"
BATCH = 1000  # points of an update
SMALL = 100  # kilobytes of vectors up to which Qdrant reads all of them


class QdrantIndex(Index):
    """A shard of Qdrant in a folder, which is gone on with if it is there.

    Args:
        plan, space: as of `Index`; those that the folder was made with.
        folder: of the shard; None: one in memory is not to be had, so a folder is needed.
        links, effort: of the graph, as of FAISS.

    Raises:
        MissingExtraError: qdrant-edge is not installed.
        SearchError: the folder's vectors are of another plan or space.
        FileError: the folder cannot be written.
    """

    def __init__(
        self, plan: Plan, space: str | None, folder: str | os.PathLike[str], *, links: int = 16, effort: int = 80
    ):
        super().__init__(plan, space)
        self._qdrant: Any = library("qdrant_edge", "qdrant", "qdrant-edge-py")
        self.folder = Path(folder)
        about = {"space": space, "plan": plan.id}
        if (self.folder / ABOUT).exists():
            theirs = read_object(self.folder / ABOUT, SearchError)
            if differ := [name for name in about if theirs.get(name) != about[name]]:
                raise SearchError(f"{folder} has vectors of another {' and '.join(differ)}: choose another folder")
            self._shard = self._qdrant.EdgeShard.load(str(self.folder))
        else:
            graph = self._qdrant.HnswIndexConfig(whole("links", links), whole("effort", effort), SMALL)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shard = self._qdrant.EdgeShard.create(str(self.folder), self._config(graph))
            write_file(self.folder / ABOUT, json.dumps(about) + "\n")

    def _config(self, graph: Any) -> Any:
        def vector(size: int, graph: Any) -> Any:
            return self._qdrant.EdgeVectorParams(size, self._qdrant.Distance.Dot, hnsw_config=graph)

        if self.plan.is_full:
            return self._qdrant.EdgeConfig(vectors={"full": vector(self.plan.dims, graph)})
        none = self._qdrant.HnswIndexConfig(0, 0, SMALL)  # full vectors only rank: they need no graph
        return self._qdrant.EdgeConfig(
            vectors={"full": vector(self.plan.dims, none), "prefix": vector(self.plan.width, graph)}
        )

    def __len__(self) -> int:
        return self._shard.count(self._qdrant.CountRequest(exact=True))

    def optimize(self) -> None:
        """Build the graphs; a search before that reads all vectors."""
        self._shard.optimize()

    def close(self) -> None:
        """Write what is pending, and let go of the folder."""
        self._shard.close()

    def _add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        for start in range(0, len(ids), BATCH):
            some = zip(ids[start : start + BATCH], vectors[start : start + BATCH], strict=True)
            points = [
                self._qdrant.Point(_point(name), self._named_vectors(vector), {"id": name}) for name, vector in some
            ]
            self._shard.update(self._qdrant.UpdateOperation.upsert_points(points))

    def _named_vectors(self, vector: np.ndarray) -> dict[str, list[float]]:
        found = {"full": vector.tolist()}
        if not self.plan.is_full:
            found["prefix"] = vector[: self.plan.width].tolist()
        return found

    def _search(self, query: np.ndarray, k: int, candidates: int) -> list[Hit]:
        nearest, effort = self._qdrant.Query.Nearest, self._qdrant.SearchParams(hnsw_ef=max(64, candidates))
        first = []
        if not self.plan.is_full:
            prefix = nearest(query[: self.plan.width].tolist(), using="prefix")
            first = [self._qdrant.Prefetch(candidates, query=prefix, params=effort)]
        request = self._qdrant.QueryRequest(
            k, query=nearest(query.tolist(), using="full"), prefetches=first, with_payload=True, params=effort
        )
        return [Hit(point.payload["id"], point.score) for point in self._shard.query(request)]

    def _vectors(self, ids: Sequence[str]) -> np.ndarray:
        found = {point.payload["id"]: point.vector["full"] for point in self._points(ids, with_vector=True)}
        return np.array([found[name] for name in ids], dtype=np.float32)

    def _there(self, ids: Sequence[str]) -> str | None:
        return next((point.payload["id"] for point in self._points(ids)), None)

    def _delete(self, ids: Sequence[str]) -> None:
        there = {point.payload["id"] for point in self._points(ids)}
        for name in ids:
            if name not in there:
                raise KeyError(name)
        self._shard.update(self._qdrant.UpdateOperation.delete_points([_point(name) for name in ids]))

    def _points(self, ids: Sequence[str], with_vector: bool = False) -> list[Any]:
        return self._shard.retrieve([_point(name) for name in ids], with_payload=True, with_vector=with_vector)


def _point(name: str) -> str:
    """The id of a point: Qdrant takes numbers and UUIDs alone."""
    return str(uuid5(NAMESPACE_URL, name))
