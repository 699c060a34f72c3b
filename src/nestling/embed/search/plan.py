"""`Plan`: which prefix finds candidates, how many, and what that was measured to cost."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save

from nestling.errors import SearchError
from nestling.files.fields import Fields
from nestling.files.reading import parse, read_metadata, read_tensors, reason
from nestling.files.writing import write_file

KEY = "nestling.plan"  # of the text in its file
MEASURED = ("target", "recall", "milliseconds", "exact_milliseconds")


@dataclass(frozen=True)
class Plan:
    """How vectors are searched: a prefix of so many coordinates finds candidates, the full vectors rank them.

    Attributes:
        dims: of the vectors.
        width: coordinates of the prefix; as many as ``dims``: all vectors are looked at in full.
        candidates: that the prefix finds.
        basis: ``[dims, dims]`` orthogonal, fp32: vectors are turned by it, so that their first coordinates say most;
            dot products stay. None: they are as they were.
        k: results a query that it was chosen for.
        target: of the recall.
        recall: measured on queries that did not choose it, against search through all vectors.
        milliseconds: of a processor, a query by `FlatIndex` on one thread; ``exact_milliseconds`` by all vectors.
        tried: a row for each width.
    """

    dims: int
    width: int
    candidates: int
    basis: np.ndarray | None = field(default=None, compare=False, repr=False)
    k: int = 10
    target: float | None = None
    recall: float | None = None
    milliseconds: float | None = None
    exact_milliseconds: float | None = None
    tried: tuple[dict[str, Any], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def full(cls, dims: int, k: int = 10) -> Plan:
        """No prefix: all vectors are looked at in full."""
        return cls(dims, dims, k, k=k)

    @property
    def is_full(self) -> bool:
        """Whether there is no prefix."""
        return self.width == self.dims

    @property
    def id(self) -> str:
        """Checksum of what stored vectors depend on: widths and basis."""
        numbers = b"" if self.basis is None else np.ascontiguousarray(self.basis, dtype=np.float32).tobytes()
        return hashlib.sha256(f"{self.dims} {self.width}".encode() + numbers).hexdigest()[:16]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the plan into a safetensors file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        about = {name: getattr(self, name) for name in ("dims", "width", "candidates", "k", *MEASURED)}
        tensors = {} if self.basis is None else {"basis": np.ascontiguousarray(self.basis)}
        write_file(file, save(tensors, {KEY: json.dumps(about | {"tried": list(self.tried)})}))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            SearchError: there is no such file, or it is damaged.
        """
        tensors, metadata = read_tensors(file, SearchError), read_metadata(file, SearchError)
        if KEY not in metadata:
            raise SearchError(f"{file} is no plan: save one with plan.save")
        try:
            fields = Fields(file, parse(metadata[KEY]), SearchError)
        except ValueError as error:
            raise SearchError(f"{file} is damaged [{reason(error)}]: choose a plan again") from error
        dims, basis = fields.whole("dims", 1), tensors.get("basis")
        if basis is not None and basis.shape != (dims, dims):
            raise SearchError(
                f"{file} is damaged: a basis of {list(basis.shape)} for {dims} dims; choose a plan again"
            )
        numbers = {name: fields.number(name, 0, default=None) for name in MEASURED}
        return cls(
            dims, fields.whole("width", 1, dims), fields.whole("candidates", 1),
            None if basis is None else basis.numpy().copy(), fields.whole("k", 1),
            tried=tuple(dict(row.values) for row in fields.objects("tried")), **numbers,
        )  # fmt: skip

    def turned(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors ``[n, >= dims]`` as they are stored and compared: cut to ``dims`` and turned, fp32.

        Raises:
            SearchError: they are narrower than the plan's, or not finite.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] < self.dims:
            raise SearchError(f"vectors of shape {vectors.shape}: expected [n, {self.dims}], or wider ones of a space")
        if not np.isfinite(vectors).all():
            raise SearchError("a vector is not finite: make the vectors again")
        cut = vectors[:, : self.dims]
        return np.ascontiguousarray(cut if self.basis is None else cut @ self.basis)

    def __str__(self) -> str:
        if self.is_full:
            said = f"all {self.dims} coordinates of every vector"
        else:
            said = f"{self.width} of {self.dims} coordinates find {self.candidates:,} candidates, all rank them"
        if self.recall is not None and self.milliseconds is not None and self.exact_milliseconds is not None:
            said += (
                f"; recall@{self.k} {self.recall:.4f} on queries that did not choose it (target {self.target:g}), "
                f"{self.milliseconds:.2f} ms a query where a search through all takes {self.exact_milliseconds:.2f}"
            )
        return said
