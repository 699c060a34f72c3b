"""One door for rows: files, data sets by name or in memory, data frames, lists and streams, with columns by name."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from nestling.data.hub import chosen, open_set
from nestling.data.jsonl import JSONL, Skip, check_file, check_text, objects, short, text_of
from nestling.data.memory import is_dict_like, label_names, rows_of
from nestling.data.tables import DELIMITERS, PARQUET, delimited, parquet
from nestling.errors import DataError, OptionError

FILES = (*JSONL, *DELIMITERS, PARQUET)
Columns = Mapping[str, str | int]  # what a reader calls a column, and what the data call it, or its place from 0 on


@dataclass(frozen=True)
class Source:
    """Rows that are read once.

    Attributes:
        name: of the file or data set, or of the class of an object.
        rows: where each row is, and the row: a dictionary, a tuple where columns have no names, or a text.
        labels: the names of integer labels by column, where the source tells them.
        given: whether the user said which columns are which.
        left_out: how many rows were left out, by the reason; readers count there.
    """

    name: str
    rows: Iterator[tuple[str, Any]]
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    given: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


def open_rows(
    source: Any, skip: Skip | None = None, columns: Columns | None = None, known: tuple[str, ...] = ()
) -> Source:
    """Open whatever holds rows.

    Args:
        source: one of

            * a file: ``.jsonl``, ``.csv``, ``.tsv``, each gzipped or not, or ``.parquet``;
            * the name of a data set of the hub, or a folder with one: ``NAME[:CONFIG[:SPLIT]]``, by default ``train``;
            * a frame of pandas, polars, pyarrow or another library that speaks Arrow, or a column of one;
            * a data set of `datasets`, streamed or not, or a dictionary of such;
            * a dictionary of columns of one length;
            * a list or any other iterable of dictionaries, tuples or texts.

        skip: told of lines of JSON that cannot be read, which are then left out; None stops there.
        columns: what columns are called here, by what a reader calls them. Others keep their names.
        known: names that a reader knows, of which "negative" stands for all that start so; any, if there are none.

    Raises:
        OptionError: ``columns`` are no names, or name what the reader does not know.
        DataError: on the call or while reading, the source cannot be read; file and line, or row, are named.
    """
    _check_columns(columns, known)
    found = _file(os.fspath(source), skip) if isinstance(source, str | os.PathLike) else _object(source)
    if columns:
        labels = {new: names for new, old in columns.items() if (names := found.labels.get(str(old)))}
        rows = ((where, _renamed(where, row, columns)) for where, row in found.rows)
        found = replace(found, rows=rows, labels={**found.labels, **labels}, given=True)
    return found


def _file(name: str, skip: Skip | None) -> Source:
    suffix = name.lower()
    if suffix.endswith(JSONL):
        check_file(name)
        return Source(name, objects(name, skip))
    for ending, delimiter in DELIMITERS.items():
        if suffix.endswith(ending):
            check_file(name)
            return Source(name, delimited(name, delimiter))
    if suffix.endswith(PARQUET):
        check_file(name)
        return Source(name, *parquet(name))
    if os.path.isfile(name) or not name.strip():
        raise DataError(f"{name or '(empty name)'}: unknown kind of file; expected {', '.join(FILES)}")
    return Source(name, *open_set(name, FILES))


def _object(data: Any) -> Source:
    if is_dict_like(data) and (sets := _sets(data)):
        return _joined(sets)
    return Source(type(data).__name__, _placed("row", data), label_names(data))


def _placed(what: str, data: Any) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {number}", row) for number, row in enumerate(rows_of(data), 1))


def _sets(data: Any) -> dict[str, Any]:
    """The data sets of a dictionary of such that are to be read, by name; none if it holds something else."""
    found = {str(name): data[name] for name in data.keys()}
    if not found or not all(map(_is_set, found.values())):
        return {}
    return {name: found[name] for name in chosen(list(found))}


def _is_set(value: Any) -> bool:
    """Whether it holds rows by itself, rather than the entries of one column."""
    if any(hasattr(value, name) for name in ("column_names", "itertuples", "iter_rows", "collect_schema")):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _joined(sets: dict[str, Any]) -> Source:
    """Data sets one after the other; their rows must be alike, which readers see to."""
    names = [label_names(value) for value in sets.values()]
    if any(other != names[0] for other in names):
        raise DataError(f"the data sets {', '.join(sets)} name their labels differently: give one of them")
    parts = (_placed(f"{name}, row", value) for name, value in sets.items())
    return Source(", ".join(sets), chain.from_iterable(parts), names[0])


def _check_columns(columns: Columns | None, known: tuple[str, ...]) -> None:
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(
        isinstance(new, str) and isinstance(old, str | int) and not isinstance(old, bool)
        for new, old in columns.items()
    ):
        raise OptionError(f"columns={short(columns)}: expected names by names, such as {{'anchor': 'question'}}")
    fits = (new in known or ("negative" in known and is_negative(new)) for new in columns)
    if known and (unknown := [new for new, good in zip(columns, fits, strict=True) if not good]):
        expected = ", ".join(known)
        raise OptionError(f"columns: {short(unknown[0])} is not read here; expected some of {expected}")


def is_negative(column: Any) -> bool:
    """Whether a column's name is one of negatives: ``negative``, ``negative_1``, ..."""
    return isinstance(column, str) and column.startswith("negative")


def _renamed(where: str, row: Any, columns: Columns) -> Any:
    if isinstance(row, tuple):
        row = dict(enumerate(row))
    if not isinstance(row, dict):
        return row
    if missing := [old for old in columns.values() if old not in row]:
        raise DataError(f"{where}: no field {missing[0]!r}; it has {', '.join(map(repr, row)) or 'none'}")
    taken = set(columns.values()) | set(columns)
    return {new: row[old] for new, old in columns.items()} | {k: v for k, v in row.items() if k not in taken}


def texts_of(data: Iterable[Any]) -> Iterator[str]:
    """The texts of an object in memory: of rows with columns, the column ``text``. Blank ones are among them.

    Raises:
        DataError: it holds neither rows nor texts, or a row has no text.
    """
    for where, row in _object(data).rows:
        if isinstance(row, dict):
            yield str(text_of(where, row, "text"))
        else:
            check_text(where, "text", row)
            yield row
