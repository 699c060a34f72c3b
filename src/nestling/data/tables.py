"""Rows of tables in files: CSV, TSV and Parquet, a few at a time."""

import csv
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from nestling.data.jsonl import lines, short
from nestling.errors import DataError, MissingExtraError
from nestling.files.reading import reason

DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
PARQUET = ".parquet"
BATCH = 256  # rows of a Parquet file that are held at once
LARGEST = 1 << 24  # characters of a cell: a quotation mark without its pair would take in the rest of the file


class Cell(str):
    """Text of a table of text, which may stand for a number."""


def delimited(name: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row below the header of a CSV or TSV file as ``{column: Cell}``, and where it ends: ``"FILE, line 3"``.

    Cells are quoted as Python's `csv` and pandas quote them; rows without text are skipped.

    Raises:
        DataError: a quotation mark is not closed, a row has more or fewer cells than the header, or the header names
            a column twice.
    """
    # Other users of csv may have raised it already; a lower limit would break them.
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))
    table = csv.reader((line + "\n" for _, line in lines(name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in table:
            where = f"{name}, line {table.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if twice := [column for column in header if header.count(column) > 1]:
                    raise DataError(f"{where}: the header names the column {short(twice[0])} twice: rename one")
                continue
            if len(cells) != len(header):
                expected = f"{len(header)} as in the header ({', '.join(map(short, header))})"
                raise DataError(f"{where}: {len(cells)} cells, expected {expected}: {short(cells)}")
            yield where, dict(zip(header, map(Cell, cells), strict=True))
    except csv.Error as error:
        raise DataError(
            f"{name}, line {table.line_num}: not a table with the separator {delimiter!r} ({error}); cells with "
            'quotation marks are written in quotation marks, the marks within them twice: "so ""quoted"" here"'
        ) from error


def parquet(name: str) -> tuple[Iterator[tuple[str, dict[str, Any]]], dict[str, list[str]]]:
    """Each row of a Parquet file, and the names of integer labels by column, where `datasets` has written such.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: on the call or later, the file cannot be read.
    """
    if not importlib.util.find_spec("pyarrow"):
        raise MissingExtraError(f"{name}: reading Parquet needs pyarrow: pip install 'nestling[data]'")
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(name)
    except Exception as error:  # pyarrow raises all kinds
        raise DataError(f"{name}: not a Parquet file that can be read [{reason(error)}]") from error
    return _parquet_rows(name, file), stored_names(file.schema_arrow.metadata)


def _parquet_rows(name: str, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except Exception as error:
        raise DataError(f"{name}: reading stopped after row {number} [{reason(error)}]") from error


def stored_names(metadata: Any) -> dict[str, list[str]]:
    """The names of integer labels by column that `datasets` keeps in an Arrow schema; none if they are no such."""
    try:
        features = json.loads(dict(metadata or {})[b"huggingface"])["info"]["features"]
        return {column: list(kind["names"]) for column, kind in features.items() if kind["_type"] == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
