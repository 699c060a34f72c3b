"""Relevance judgements of retrieval sets (qrels), as BEIR, MTEB and TREC write them."""

import csv
import math
import numbers
from collections.abc import Iterator
from typing import Any

from nestling.data.jsonl import field_of, lines, short
from nestling.data.rows import open_rows
from nestling.errors import DataError

PLAIN = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".qrels")
ROWS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
NAMES = (
    ("query-id", "query_id", "queryid", "qid", "query", "topic"),
    ("corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "did", "pid", "document"),
    ("score", "relevance", "rel", "gain", "label"),
)
Judgement = tuple[str, str, str, float]  # where it is, query, document, gain


def read_judgements(name: str) -> Iterator[Judgement]:
    """Judgements of a file, in order.

    A text file has three columns, query id, document id and gain, or TREC's four, in which the second means nothing.
    They are separated by tabs, perhaps in quotation marks, or by spaces; the first line may be a header, by whose
    names columns are told where it has them. Rows of other files have such names.

    Raises:
        DataError: a line has other columns, or a gain that is no finite number.
    """
    if not name.lower().endswith(PLAIN):
        for where, row in open_rows(name).rows:
            query, document, gain = (_named(where, row, names) for names in NAMES)
            yield where, id_of(where, "query", query), id_of(where, "document", document), _checked(where, gain)
        return
    places, first = (0, 1, 2), True
    for where, line in lines(name):
        if not line.strip():
            continue
        cells = _cells(line)
        if len(cells) not in (3, 4):
            raise DataError(
                f"{where}: expected 3 columns separated by tabs (query, document, gain) or TREC's 4, "
                f"got {len(cells)}: {short(line)}"
            )
        if first:
            first, places = False, (0, 1, 2) if len(cells) == 3 else (0, 2, 3)
            if _number(cells[places[2]]) is None and (found := _header(cells)):
                places = found
                continue
        if max(places) >= len(cells):
            raise DataError(f"{where}: {len(cells)} columns, and more in the first line: {short(line)}")
        query, document, gain = (cells[place] for place in places)
        yield where, query, document, _checked(where, gain)


def id_of(where: str, field: str, value: Any) -> str:
    """An id as text; integers are what pandas makes of ids that look like such."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be text or an integer, got {short(value)}")
    return str(value)


def _cells(line: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter="\t"))
    except csv.Error:
        cells = []
    if len(cells) not in (3, 4):  # a quotation mark may belong to an id
        cells = line.split("\t") if "\t" in line else line.split()
    return [cell.strip() for cell in cells]


def _header(cells: list[str]) -> tuple[int, int, int] | None:
    """The places of query, document and gain in a line without a gain, which is a header whatever it is called.

    A line with ids, whose gain is unreadable, is none: headers have no digits.
    """
    small = [cell.lower() for cell in cells]
    places = [next((small.index(name) for name in names if name in small), None) for names in NAMES]
    if None not in places:
        return (places[0], places[1], places[2])  # type: ignore[return-value]
    if any(any(c.isdigit() for c in cell) for cell in cells[:-1]):
        return None
    return (0, 1, 2) if len(cells) == 3 else (0, 2, 3)


def _named(where: str, row: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected the columns {', '.join(group[0] for group in NAMES)}, got {short(row)}")
    return field_of(where, row, next((name for name in names if name in row), names[0]))


def _checked(where: str, gain: Any) -> float:
    number = _number(gain)
    if number is None:
        raise DataError(f"{where}: the gain must be a finite number, got {short(gain)}")
    return number


def _number(gain: Any) -> float | None:
    try:
        value = float(gain) if not isinstance(gain, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
