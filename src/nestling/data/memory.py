"""Rows of objects in memory: data frames, data sets, columns, and lists or streams of rows, without importing theirs.

A row comes out as a dictionary where its columns have names, as a tuple where they have none, and as a text where that
is all there is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from nestling.data.jsonl import short
from nestling.data.tables import stored_names
from nestling.errors import DataError, MissingExtraError

SLICE = 256  # rows of an Arrow table that are made into Python objects at once


def rows_of(data: Any) -> Iterator[Any]:
    """The rows of an object, one after the other, each as it was given but for the containers named above.

    Raises:
        DataError: it holds no rows.
    """
    for matches, read in KINDS:
        if matches(data):
            return read(data)
    kind = type(data).__name__
    if isinstance(data, str | bytes | bytearray | memoryview):
        raise DataError(f"expected rows or texts, got one {kind}, {short(data)}: give a list of them")
    if hasattr(data, "readline"):
        raise DataError(f"expected rows or texts, got an open file, {short(data)}: read it by its name")
    if isinstance(data, set | frozenset):
        data = sorted(data, key=repr)  # its own order is another in every process
    if not hasattr(data, "__iter__") and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return (_row(data[place]) for place in range(len(data)))  # such as a data set of torch
    try:
        return map(_row, iter(data))
    except TypeError:
        raise DataError(f"expected rows or texts, got {kind} {short(data)}, which holds none") from None


def label_names(data: Any) -> dict[str, list[str]]:
    """The names of integer labels by column, where a data set of `datasets` or an Arrow table tells them."""
    features = getattr(data, "features", None)
    if isinstance(features, Mapping):
        found = {column: getattr(kind, "names", None) for column, kind in features.items()}
        return {column: list(names) for column, names in found.items() if isinstance(names, list)}
    if not hasattr(data, "to_batches") and not hasattr(data, "read_next_batch"):  # a lazy frame works for its schema
        return {}
    return stored_names(getattr(getattr(data, "schema", None), "metadata", None))


def is_dict_like(data: Any) -> bool:
    """Whether columns, or data sets, can be had from it by name; a pandas Series has ``keys`` as well."""
    return isinstance(data, Mapping) or (
        all(hasattr(data, name) for name in ("keys", "__getitem__")) and not hasattr(data, "ndim")
    )


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda data: not isinstance(data, type) and all(hasattr(data, name) for name in names)


def _pandas(frame: Any) -> Iterator[dict[str, Any]]:
    names = list(frame.columns)
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"the frame has two columns called {short(twice[0])}: rename one")
    return (dict(zip(names, row, strict=True)) for row in frame.itertuples(index=False, name=None))


def _polars(frame: Any) -> Iterator[dict[str, Any]]:
    return iter(frame.iter_rows(named=True))


def _lazy(frame: Any) -> Iterator[Any]:
    return rows_of(frame.collect())


def _arrow(table: Any) -> Iterator[Any]:
    """A table, a batch, a reader or a data set of pyarrow."""
    if hasattr(table, "to_batches"):
        batches: Iterable[Any] = table.to_batches()
    else:
        batches = [table] if hasattr(table, "num_rows") else table
    for batch in batches:
        for start in range(0, batch.num_rows, SLICE):
            yield from batch.slice(start, SLICE).to_pylist()


def _array(column: Any) -> Iterator[Any]:
    """A column of pyarrow or polars."""
    values = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
    return map(_row, values)


def _stream(frame: Any) -> Iterator[Any]:
    """Any other frame that speaks Arrow: DuckDB, ibis, cuDF, Modin."""
    try:
        from pyarrow import RecordBatchReader
    except ImportError:
        raise MissingExtraError(
            f"reading {type(frame).__name__} needs pyarrow: pip install 'nestling[data]'"
        ) from None
    return _arrow(RecordBatchReader.from_stream(frame))


def _hub(rows: Any) -> Iterator[Any]:
    """A data set of `datasets`; one in a format of frames would give a frame a row."""
    kind = getattr(rows, "format", None)
    plain = isinstance(kind, Mapping) and kind.get("type") in ("pandas", "polars", "arrow")
    return map(_row, iter(rows.with_format(None) if plain else rows))


def _columns(columns: Any) -> Iterator[dict[str, Any]]:
    """Columns by name, all of one length."""
    found = {name: columns[name] for name in columns.keys()}
    sizes = {name: len(values) for name, values in found.items() if _is_column(values)}
    if not found or len(sizes) < len(found) or len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} ({sizes.get(name, short(found[name]))})" for name in found) or "nothing"
        raise DataError(
            f"expected rows or texts, got one {type(columns).__name__} of {shown}: give a list of rows, or columns "
            "that all have as many entries"
        )
    return (dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True))


def _is_column(values: Any) -> bool:
    return (
        hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0 and not isinstance(values, str | bytes | Mapping)
    )


def _row(row: Any) -> Any:
    """A row as a dictionary, a tuple or a text; anything else is left for the reader to refuse."""
    if isinstance(row, str):
        return str(row)  # numpy's are of a class of their own
    if isinstance(row, Mapping):
        return dict(row)
    if hasattr(row, "_asdict"):
        return dict(row._asdict())
    if is_dataclass(row) and not isinstance(row, type):
        return asdict(row)
    if names := getattr(getattr(row, "dtype", None), "names", None):  # a record of numpy
        return {name: row[name] for name in names}
    if hasattr(row, "keys") and hasattr(row, "__getitem__"):  # of sqlite3, or a Series
        return {name: row[name] for name in row.keys()}
    if isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1:
        return tuple(row)
    return row


# What is asked first: frames also have a length and items, which are their columns.
KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Iterator[Any]]], ...] = (
    (_has("itertuples", "columns"), _pandas),
    (_has("iter_rows", "columns"), _polars),
    (_has("collect", "collect_schema"), _lazy),
    (_has("features", "with_format"), _hub),
    (_has("schema", "to_batches"), _arrow),
    (_has("schema", "num_rows", "slice"), _arrow),
    (_has("schema", "read_next_batch"), _arrow),
    (_has("columns", "__arrow_c_stream__"), _stream),
    (_has("to_pylist"), _array),
    (_has("to_list", "to_arrow"), _array),
    (is_dict_like, _columns),
)
