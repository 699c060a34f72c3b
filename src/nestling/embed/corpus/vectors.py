"""`Vectors`: a folder of vectors that `encode_corpus` has made, read."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nestling.embed.corpus.config import DTYPES, FORMATS
from nestling.embed.corpus.shards import read_shard, unpacked
from nestling.embed.ladder import Ladder
from nestling.errors import EncodeError, LadderError
from nestling.files.fields import Fields
from nestling.files.reading import read_object
from nestling.files.writing import write_file

MANIFEST, FORMAT = "vectors.json", 1


@dataclass(frozen=True)
class Vectors:
    """Vectors of a corpus in a folder, by id and size.

    Attributes:
        folder: where they are.
        sizes: the names of sizes.
        rows: how many texts there are.
        spaces: by the size's name, the id of the space that its vectors are in; those of one space can be compared.
        job: what the vectors depend on: the model's checksum, sizes, dtype and so on.
        shard_rows: texts of each shard; the last one may have fewer.
    """

    folder: Path
    sizes: tuple[str, ...]
    rows: int
    spaces: dict[str, str]
    job: dict[str, Any]
    shard_rows: int

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Vectors":
        """Read the manifest of a folder.

        Raises:
            EncodeError: it holds no vectors, is damaged, or the run that makes them has not ended.
        """
        path = Path(folder) / MANIFEST
        fields = read_manifest(Path(folder))
        job = fields.object("job")
        if fields.values.get("rows") is None:
            raise EncodeError(f"{folder}: not all vectors are there yet: run the same `nestling embed encode` again")
        sizes, spaces = tuple(cup.name for cup in _sizes(path, job.text("sizes"))), job.object("spaces")
        return cls(
            Path(folder), sizes, fields.whole("rows"), {size: spaces.text(size) for size in sizes}, dict(job.values),
            job.whole("shard_rows", 1),
        )  # fmt: skip

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.rows // self.shard_rows)

    @cached_property
    def ids(self) -> list[str]:
        """The id of each text."""
        return [label for ids, _ in self.parts(self.sizes[0]) for label in ids]

    def parts(self, size: Any) -> Iterator[tuple[list[str], np.ndarray]]:
        """For each shard the ids, and the vectors ``[n, dims]`` as they are stored.

        Raises:
            LadderError: there is no such size.
            EncodeError: a file is missing or damaged.
        """
        name = Ladder.parse([size]).full.name
        if name not in self.sizes:
            raise LadderError(f"{self.folder} has no vectors of {name}: it has {', '.join(self.sizes)}")
        for number in range(self.shards):
            ids, found = read_shard(self.folder, number, self.job["format"], (name,))
            yield ids, found[name]

    def read(self, size: Any) -> np.ndarray:
        """All vectors of a size, fp32 ``[n, dims]``, in the order of `ids`. Errors are those of `parts`."""
        return np.concatenate([unpacked(part) for _, part in self.parts(size)])


def read_manifest(folder: Path) -> Fields:
    """The manifest of a folder of vectors; its ``rows`` is null until all are there.

    Raises:
        EncodeError: there is none, or it is damaged or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise EncodeError(f"{folder} holds no vectors: make them with `nestling embed encode`")
    fields = Fields(path, read_object(path, EncodeError), EncodeError)
    if (version := fields.whole("format")) != FORMAT:
        raise EncodeError(f"{path} has format {version}, this version reads {FORMAT}: update nestling")
    job = fields.object("job")
    job.text("format", FORMATS)
    job.text("dtype", DTYPES)
    return fields


def write_manifest(folder: Path, job: dict[str, Any], rows: int | None, files: dict[str, str] | None) -> None:
    """Write what the vectors of a folder are; ``rows`` and the checksums of files once all are there.

    Raises:
        FileError: it cannot be written.
    """
    stored = {"format": FORMAT, "job": job, "rows": rows, "sha256": files}
    write_file(folder / MANIFEST, json.dumps(stored, indent=1) + "\n")


def _sizes(path: Path, said: str) -> Ladder:
    try:
        return Ladder.parse(said)
    except LadderError as error:
        raise EncodeError(f"{path} is damaged: {error}") from error
