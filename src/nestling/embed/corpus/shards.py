"""Shards: the vectors of a range of texts in files of their own, and a note beside them that they are whole.

The note is written last. It has the checksum of the texts and of each file, so that a run that was killed, or whose
corpus has changed since, knows which shards it need not make again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nestling.errors import EncodeError, MissingExtraError
from nestling.files.fields import Fields
from nestling.files.folders import sha256
from nestling.files.reading import check_regular, read_json, read_object, reason
from nestling.files.writing import write_file

IDS = "id"  # the column of a Parquet file


@dataclass(frozen=True)
class Work:
    """Texts that become one shard.

    Attributes:
        number: of the shard, from 0 on.
    """

    number: int
    ids: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def checksum(self) -> str:
        """SHA-256 of ids and texts."""
        return hashlib.sha256(json.dumps([self.ids, self.texts]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard that was written.

    Attributes:
        number: from 0 on.
        rows: its texts.
        texts: their checksum.
        files: the checksum of each of its files, by name.
    """

    number: int
    rows: int
    texts: str
    files: dict[str, str]


def stem(number: int) -> str:
    """What the names of a shard's files start with."""
    return f"part-{number:05d}"


def write_shard(
    folder: Path, work: Work, vectors: Mapping[str, np.ndarray], format: str, dtype: str, job: str
) -> Shard:
    """Write the files of a shard, and its note last.

    Args:
        vectors: fp32 ``[n, dims]`` by the size's name.
        format, dtype: see `EncodeConfig`.
        job: the id of what vectors depend on beside the texts.

    Raises:
        FileError: one cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    name = stem(work.number)
    stored = {size: packed(values, dtype) for size, values in vectors.items()}
    if format == "parquet":
        write_file(folder / f"{name}.parquet", partial(_write_parquet, work.ids, stored))
        files = [f"{name}.parquet"]
    else:
        for size, values in stored.items():
            write_file(folder / f"{name}.{size}.npy", partial(_write_npy, values))
        write_file(folder / f"{name}.ids.json", json.dumps(work.ids) + "\n")
        files = [*(f"{name}.{size}.npy" for size in stored), f"{name}.ids.json"]
    shard = Shard(work.number, len(work.ids), work.checksum, {file: sha256(folder / file) for file in files})
    note = {"job": job, "rows": shard.rows, "texts": shard.texts, "files": shard.files}
    write_file(folder / f"{name}.json", json.dumps(note, indent=1) + "\n")
    return shard


def known_shard(folder: Path, number: int, job: str) -> Shard | None:
    """The shard of that number, if it is of this job and its files are as they were written; else None."""
    path = folder / f"{stem(number)}.json"
    try:
        note = Fields(path, read_object(path, EncodeError), EncodeError)
        files = note.object("files")
        shard = Shard(
            number, note.whole("rows"), note.text("texts"), {name: files.text(name) for name in files.values}
        )
        whole = all(Path(name).name == name and sha256(folder / name) == sum for name, sum in shard.files.items())
        return shard if whole and note.text("job") == job else None
    except (EncodeError, OSError):
        return None


def read_shard(folder: Path, number: int, format: str, sizes: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """Ids and vectors as they are stored, ``[n, dims]`` by the size's name; arrays of ``npy`` are mapped.

    Raises:
        EncodeError: a file is missing or damaged.
    """
    name = stem(number)
    if format == "parquet":
        return _read_parquet(folder / f"{name}.parquet", sizes)
    ids = read_json(folder / f"{name}.ids.json", EncodeError, unique=False)
    found = {}
    for size in sizes:
        path = folder / f"{name}.{size}.npy"
        check_regular(path, EncodeError)
        try:
            found[size] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise EncodeError(f"{path} is damaged [{reason(error)}]: make the vectors again") from error
    if not isinstance(ids, list) or any(len(values) != len(ids) for values in found.values()):
        raise EncodeError(f"{folder / name}: its ids and vectors are not equally many: make the vectors again")
    return ids, found


def packed(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Vectors ``[n, dims]`` as they are stored; see `EncodeConfig`."""
    if dtype == "float16":
        return vectors.astype(np.float16)
    scale = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors * (127 / np.maximum(scale, 1e-30))).astype(np.int8)


def unpacked(stored: np.ndarray) -> np.ndarray:
    """fp32 vectors from what `packed` made; those of int8 have unit length."""
    vectors = np.asarray(stored, dtype=np.float32)
    if stored.dtype != np.int8:
        return vectors
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def pyarrow_parquet() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("Parquet needs pyarrow: pip install 'nestling[data]', or choose npy") from error
    return pyarrow, pyarrow.parquet


def _write_npy(values: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, values, allow_pickle=False)


def _write_parquet(ids: tuple[str, ...], stored: Mapping[str, np.ndarray], path: Path) -> None:
    pyarrow, parquet = pyarrow_parquet()
    columns = [pyarrow.array(ids, pyarrow.string())]
    for values in stored.values():
        flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
        columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    table = pyarrow.Table.from_arrays(columns, names=[IDS, *stored])
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)


def _read_parquet(path: Path, sizes: tuple[str, ...]) -> tuple[list[str], dict[str, np.ndarray]]:
    check_regular(path, EncodeError)
    try:
        table = pyarrow_parquet()[1].read_table(path, columns=[IDS, *sizes])
        found = {}
        for size in sizes:
            column = table.column(size).combine_chunks()
            found[size] = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        return table.column(IDS).to_pylist(), found
    except MissingExtraError:
        raise
    except Exception as error:  # pyarrow raises all kinds
        raise EncodeError(f"{path} is damaged [{reason(error)}]: make the vectors again") from error
