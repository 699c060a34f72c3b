"""Reading texts with their ids: what is embedded to be found again."""

import numbers
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nestling.data.jsonl import not_empty, short, text_of
from nestling.data.layout import Layout
from nestling.data.rows import Columns, open_rows
from nestling.data.texts import TEXT, read_texts
from nestling.data.told import tell_left_out
from nestling.errors import DataError

ID_COLUMNS = ("id", "_id")
KNOWN = ("text", "id")


@dataclass(frozen=True)
class Record:
    """A text and its id."""

    id: str
    text: str


def read_records(source: Any, *, columns: Columns | None = None, layout: Layout = "auto") -> Iterator[Record]:
    """Yield texts with their ids, always in the same order; blank texts are left out, and told of.

    An id is that of the column ``id`` or ``_id``, as text; without such a column it is the number of the text, from 0
    on.

    Args:
        source: as of `nestling.data.texts.read_texts`; None for the built-in pages.
        columns: what the columns ``text`` and ``id`` are called, such as ``{"text": "body", "id": "doc"}``.
        layout: of a text file; see there.

    Raises:
        OptionError: ``columns`` names others, or the source has none.
        DataError: on the call or while reading, the source cannot be read, a row has no text, an id is neither text
            nor a whole number, only some rows have one, or two have the same.
    """
    if source is None or (isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith(TEXT)):
        texts = read_texts(source, columns=columns, layout=layout)
        return (Record(str(number), text) for number, text in enumerate(texts))
    found = open_rows(source, None, columns, KNOWN)
    return _records(found.name, not_empty(found.name, found.rows), found.left_out)


def _records(name: str, rows: Iterator[tuple[str, Any]], left_out: Any) -> Iterator[Record]:
    known: set[str] = set()
    column: str | None = None
    count = 0
    for where, row in rows:
        text = _text(where, row)
        if count == 0 and isinstance(row, dict):
            column = next((name for name in ID_COLUMNS if row.get(name) is not None), None)
        if not text.strip():
            left_out["blank texts"] += 1
            continue
        label = str(count) if column is None else _id(where, row, column)
        if column is not None:
            if label in known:
                raise DataError(f"{where}: the id {short(label)} is there twice: each text needs an id of its own")
            known.add(label)
        yield Record(label, text)
        count += 1
    if count == 0:
        raise DataError(f"{name}: all texts are blank; expected at least one that is not")
    tell_left_out(name, left_out)


def _text(where: str, row: Any) -> str:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a column 'text', got {short(row)}: say which one it is with columns")
    if "text" not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{where}: no field 'text'; it has {there}: say which one it is with columns={{'text': ...}} (on the "
            "command line --columns text=...)"
        )
    return str(text_of(where, row, "text"))


def _id(where: str, row: Any, column: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | numbers.Integral) or value == "":
        raise DataError(f"{where}: '{column}' must be text or a whole number, got {short(value)}")
    return str(value)
