"""A teacher outside of the model: embeddings of the training texts, cached in a table, found by row numbers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from nestling.embed.model.copies import copied_tree
from nestling.errors import EvaluationError, ExampleError, OptionError, TrainingError
from nestling.files.checksums import damaged
from nestling.files.reading import check_regular
from nestling.files.temporary import temporary_file
from nestling.files.writing import naming, sync

TEACHER_FILE = "teacher.npy"
TABLE = re.compile(r"teacher(-\d+-of-\d+)?\.npy")
CHUNK = 1024  # texts that are embedded between two looks at the progress


def numbered(columns: Mapping[str, Sequence[str]], prompts: Mapping[str, str]) -> tuple[list[tuple[str, str]], Tensor]:
    """Each text that a teacher has to embed once, with its prompt, and which of them each row has.

    Returns:
        Pairs (prompt, text), and their numbers ``[rows, columns]``.
    """
    numbers: dict[tuple[str, str], int] = {}
    rows = [
        [numbers.setdefault((prompts.get(name, ""), text), len(numbers)) for text in column]
        for name, column in columns.items()
    ]
    return list(numbers), torch.tensor(rows).T


def shared_table(
    path: Path,
    teacher: SentenceTransformer,
    texts: Sequence[tuple[str, str]],
    rank: int,
    processes: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """The file of `write_table`, if it is not there, by several processes that see one file system.

    Each embeds every n-th text into a file of its own, and the first joins them. They wait by looking for the files:
    a barrier of torch.distributed gives up after half an hour, which a large teacher takes on many texts. That one of
    them has died is for the launcher to notice, as torchrun does.
    """
    count = len(texts)
    parts = {path.with_name(f"{path.stem}-{i}-of-{processes}.npy"): len(texts[i::processes]) for i in range(processes)}
    parts = {part: rows for part, rows in parts.items() if rows}
    mine = path.with_name(f"{path.stem}-{rank}-of-{processes}.npy")
    if processes == 1 and not _is_table(path, count):
        write_table(path, teacher, texts, advance=advance)
    elif mine in parts and not _is_table(path, count) and not _is_table(mine, parts[mine]):
        write_table(mine, teacher, texts[rank::processes], advance=advance)
    if rank == 0 and not _is_table(path, count):
        _wait_for(parts)
        _join(path, list(parts), count)
    _wait_for({path: count})


def tables_in(folder: Path) -> list[Path]:
    """The tables of a training in its folder, and parts of them."""
    return [path for path in folder.iterdir() if TABLE.fullmatch(path.name)] if folder.is_dir() else []


def remove_stale(folder: Path, resume: bool) -> None:
    """Remove the tables of a training that a new one must not follow, or one that is not what was written.

    A training that goes on makes it again; one that is truncated is found without this.

    Raises:
        TrainingError: something that is no file has the table's name.
    """
    if not resume:
        for left in tables_in(folder):  # by one that was stopped before its first checkpoint
            left.unlink()
    elif os.path.lexists(path := folder / TEACHER_FILE):
        check_regular(path, TrainingError)
        if path.name in damaged(folder, TrainingError):
            path.unlink()


def _is_table(path: Path, rows: int) -> bool:
    """Whether a file is a table of so many rows, complete: one that was left damaged is written again."""
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return table.ndim == 2 and len(table) == rows and table.dtype == np.float32


def _wait_for(tables: Mapping[Path, int]) -> None:
    while not all(_is_table(path, rows) for path, rows in tables.items()):
        time.sleep(0.2)


def _join(path: Path, parts: Sequence[Path], count: int) -> None:
    tables = [np.load(part, mmap_mode="r") for part in parts]
    with _new_table(path) as make:
        joined = make((count, tables[0].shape[1]))
        for rank, table in enumerate(tables):
            joined[rank :: len(tables)] = table
    for part in parts:
        part.unlink()


@contextmanager
def _new_table(path: Path) -> Iterator[Callable[[tuple[int, int]], np.ndarray]]:
    """A function that makes a table of a shape; the file appears, filled, when the body is done.

    Raises:
        FileError: it cannot be written, or the disk does not have the room for it.
    """
    with naming(path), temporary_file(path.parent) as new:

        def make(shape: tuple[int, int]) -> np.ndarray:
            table = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a page for which there is no room would end the process
                with open(new, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
            return table

        yield make
        sync(new)
        new.replace(path)


def write_table(
    path: Path,
    teacher: SentenceTransformer,
    texts: Sequence[tuple[str, str]],
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Embed texts by a model of any kind, into a file of numpy's that can be mapped: ``[N, D]``, fp32.

    The file appears when it is complete. The model runs in eval mode, in a copy that shares its weights.

    Args:
        texts: pairs (prompt, text).
        advance: told how many texts are done.

    Raises:
        ValueError: an embedding is not finite.
    """
    table = None
    with _new_table(path) as make:
        for places, vectors in _embedded(teacher, texts, batch_size):
            if not np.isfinite(vectors).all():
                raise EvaluationError("the teacher gives embeddings that are not finite: its weights are broken")
            if table is None:
                table = make((len(texts), vectors.shape[1]))
            table[places] = vectors
            advance(len(places))
        if isinstance(table, np.memmap):
            table.flush()


def _embedded(
    teacher: SentenceTransformer, texts: Sequence[tuple[str, str]], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places of some texts of one prompt, and their embeddings, until all are done."""
    model = copied_tree(teacher)  # which `encode` puts into eval mode
    order = sorted(range(len(texts)), key=lambda i: (texts[i][0], len(texts[i][1])))
    for prompt, places in groupby(order, key=lambda i: texts[i][0]):
        while some := list(islice(places, CHUNK)):
            said = [texts[i][1] for i in some]
            vectors = model.encode(said, prompt=prompt, batch_size=batch_size, show_progress_bar=False)
            yield some, vectors


def checked_teacher(table: Tensor | np.ndarray) -> Tensor:
    """The table ``[N, D]``; one that is mapped from a file stays there.

    Raises:
        ValueError: it is of another shape, or not of floats.
    """
    teacher = torch.as_tensor(table)
    if teacher.ndim != 2 or not teacher.is_floating_point():
        raise OptionError(f"expected teacher embeddings [N, D] of floats, got {teacher.dtype} {list(teacher.shape)}")
    return teacher


def rows_of(teacher: Tensor, labels: Tensor | None, columns: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's unit vectors of the texts of a batch, ``[B, D]`` for each column, where the columns are.

    Args:
        teacher: ``[N, D]``, on any device.
        labels: row numbers ``[B, columns]``.
        columns: the student's vectors ``[B, d]`` of each column.

    Raises:
        ValueError: labels are missing, of another shape, or name rows that are not there.
    """
    shape = [len(columns[0]), len(columns)]
    if labels is None or labels.is_floating_point() or list(labels.shape) != shape:
        got = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise ExampleError(
            f"with a teacher, labels are the numbers of its rows: expected integers of shape {shape} "
            f"(texts, columns), got {got}"
        )
    numbers = labels.to(teacher.device)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(teacher):
        raise ExampleError(f"labels name rows {low} to {high} of a teacher that has {len(teacher)}")
    return list(normalize(teacher[numbers.T].to(columns[0].device).float(), dim=-1))
