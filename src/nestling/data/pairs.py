"""Readers of sentence pairs: scored ones (STS), to measure on, and positive ones, to train on.

Both read whatever `nestling.data.rows.open_rows` opens: files, data sets, frames and lists.
"""

import math
import numbers
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import chain, combinations
from typing import Any

from nestling.data.jsonl import check_said, field_of, not_empty, short, text_of
from nestling.data.positives import Positive, check_positive, positive_pairs
from nestling.data.rows import Columns, Source, is_negative, open_rows
from nestling.data.tables import Cell
from nestling.data.told import Rows, tell_left_out
from nestling.errors import DataError

Pair = dict[str, str]
LABELS = ("label", "labels", "score", "scores")  # the columns that sentence-transformers reads as labels
SCORED = ("sentence1", "sentence2", "score")
PLAIN = (("anchor", "positive"), ("query", "passage"))
# In the order in which they are tried.
FORMS = (*PLAIN, ("texts",), ("text1", "text2", "label"), ("premise", "hypothesis", "label"), ("words", "definition"))
KNOWN = ("negative", *dict.fromkeys(column for form in FORMS for column in form))
# Columns that look like something to learn from, which must not be lost: labels, negatives, further positives.
CONTENT = re.compile(r"labels?|.*neg(s|atives?)?([^a-z].*)?|positives?[_-]?[0-9]*", re.IGNORECASE)


def read_sts(source: Any, *, columns: Columns | None = None) -> Rows:
    """Read scored sentence pairs: ``sentence1, sentence2`` (texts), ``score`` (a number), perhaps ``subset`` (a text).

    Scores may be on any scale; what is measured on them, Spearman's correlation, reads their order.

    Args:
        source: see `nestling.data.rows.open_rows`; tuples are those columns in that order.
        columns: what the columns are called there, such as ``{"score": "similarity"}``.

    Returns:
        One ``{"sentence1": str, "sentence2": str, "score": float[, "subset": str]}`` for each row, in order.

    Raises:
        DataError: the source cannot be read or is empty, or a row is not as described (file and line are named).
        OptionError: ``columns`` names others.
    """
    found = open_rows(source, columns=columns, known=(*SCORED, "subset"))
    rows = Rows(not_empty(found.name, scored(found)), found.left_out)
    tell_left_out(found.name, found.left_out)
    return rows


def read_pairs(source: Any, *, columns: Columns | None = None, positive: Positive | None = None) -> Rows:
    """Read positive pairs or triplets for contrastive training.

    Rows have one of these forms, told by the first one; each row must have the form's columns:

    * ``anchor, positive[, negative...]``;
    * ``query, passage[, negative...]``, which keep these names: a model may have a prompt for each;
    * ``texts``, a list of texts that mean the same: every two of them are a pair;
    * ``text1, text2, label`` or ``premise, hypothesis, label``: pairs whose label says that they mean the same;
    * ``words, definition``: a dictionary's terms, joined by commas, and their meaning.

    Negatives are all columns whose names start so: ``negative``, ``negative_1, negative_2``, or a list of texts in
    ``negatives``, of as many in each row.

    Labels are names ("entailment", "duplicate", ...), integers that a data set has names for, or plain integers: of
    ``text1, text2`` 1 is the same; of ``premise, hypothesis`` 0 is entailment where a 2 shows that there are three.
    Where integers may mean either, ``positive`` has to say.

    Args:
        source: see `nestling.data.rows.open_rows`; tuples are anchor, positive and negatives.
        columns: what the columns are called there, such as ``{"anchor": "question", "positive": "answer"}``.
        positive: the label, or labels, of pairs that mean the same.

    Returns:
        ``{"anchor": str, "positive": str[, "negative": str, ...]}``, or ``{"query": str, "passage": str, ...}``, the
        same columns in every row, in order. Its ``left_out`` counts other labels, and columns that are not read.

    Raises:
        DataError: the source cannot be read or is empty, has another form, has columns beside that would be lost
            though they look like labels or negatives, a text is blank, or no pair is positive.
        OptionError: ``columns`` or ``positive`` names what there is not.
    """
    found = open_rows(source, columns=columns, known=KNOWN)
    rows = Rows(not_empty(found.name, positives(found, positive), "positive pair"), found.left_out)
    tell_left_out(found.name, found.left_out)
    return rows


def scored(source: Source) -> Iterator[dict[str, Any]]:
    """Scored pairs of a source, as `read_sts` gives them."""
    for where, row in named_rows(source, SCORED):
        pair: dict[str, Any] = {column: said(where, row, column) for column in SCORED[:2]}
        pair["score"] = number_of(where, row, "score")
        if row.get("subset") is not None:
            pair["subset"] = text_of(where, row, "subset")
        if more := [column for column in row if is_negative(column)]:
            raise DataError(f"{where}: {', '.join(more)} beside {', '.join(SCORED)} would be lost: leave it out")
        _count_others(source, row, {*pair, "subset"})
        yield pair


def positives(source: Source, positive: Positive | None = None) -> Iterator[Pair]:
    """Positive pairs of a source, as `read_pairs` gives them."""
    rows = named_rows(source, ("anchor", "positive"))
    first = next(rows, None)
    if first is None:
        return
    where, row = first
    form = next((fields for fields in FORMS if all(field in row for field in fields)), None)
    if form is None:
        fields, expected = ", ".join(map(repr, row)) or "none", "; ".join(map(", ".join, FORMS))
        raise DataError(
            f"{where}: fields {fields} are no form of pair; expected {expected}. Say which are what with "
            "columns={'anchor': ..., 'positive': ...} (on the command line --columns anchor=...,positive=...)"
        )
    labelled = "label" in form
    check_positive(positive, labelled)
    rows = _checked(source, chain([first], rows), form, [column for column in row if is_negative(column)])
    if labelled:
        read = ((where, _renamed_pair(where, row, form), label_of(row)) for where, row in rows)
        names = source.labels.get("label")
        yield from positive_pairs(read, form[0] == "premise", names, positive, source.left_out)
        return
    for where, row in rows:
        yield from LISTS[form](where, row) if form in LISTS else [_pair(where, row, form)]


def named_rows(source: Source, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with columns; tuples take the names given, and further texts are negatives."""
    for where, row in source.rows:
        if isinstance(row, tuple):
            more = len(row) - len(names)
            row = dict(zip((*names, *(["negative"] if more == 1 else _numbered("negative", more))), row, strict=False))
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected columns, got {short(row)}")
        yield where, row


def number_of(where: str, row: dict[str, Any], column: str) -> float:
    """A finite number, of Python, NumPy or a database, or of a table of text."""
    value = field_of(where, row, column)
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    number = math.nan
    if isinstance(plain, numbers.Real | Decimal | Cell) and not isinstance(plain, bool):
        try:
            number = float(plain)
        except (ValueError, OverflowError):
            pass
    if not math.isfinite(number):
        raise DataError(f"{where}: '{column}' must be a finite number, got {short(value)}")
    return number


def label_of(row: dict[str, Any]) -> Any:
    """The label of a row; its name, where the row has that too, as data sets of SetFit do."""
    name = row.get("label_text")
    return name if isinstance(name, str) and name.strip() else row.get("label")


def said(where: str, row: dict[str, Any], column: str) -> str:
    """The text of a column; DataError if it is missing or blank."""
    text = field_of(where, row, column)
    check_said(where, column, text)
    return str(text) if type(text) is not str else text


def _checked(
    source: Source, rows: Iterator[tuple[str, dict[str, Any]]], form: tuple[str, ...], negatives: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, once it is sure that nothing is lost of them; what is not read is counted."""
    sizes: dict[str, int | None] = {}
    used = {*form, *negatives, *(("label_text",) if "label" in form else ())}
    for where, row in rows:
        others = [column for column in row if column not in used]
        if more := [str(c) for c in others if (CONTENT.fullmatch(str(c)) and not source.given) or is_negative(c)]:
            read = ", ".join([*form, *negatives])
            raise DataError(
                f"{where}: {', '.join(more)} beside {read} would be lost: have it in every row, leave it out, or say "
                "which columns are read with columns={...} (--columns)"
            )
        if negatives and form not in PLAIN:
            raise DataError(f"{where}: {', '.join(negatives)} beside {', '.join(form)} would be lost: leave it out")
        for column in negatives:
            value = field_of(where, row, column)
            size = len(value) if _is_list(value) else None
            expected = sizes.setdefault(column, size)
            if size != expected:
                many = "one text" if expected is None else f"{expected} texts"
                raise DataError(f"{where}: {column!r} is {short(value)}: expected {many}, as in the first row")
        _count_others(source, row, used)
        yield where, row


def _count_others(source: Source, row: dict[str, Any], used: set[str]) -> None:
    for column in row:
        if column not in used:
            source.left_out[f"column {column}"] += 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _numbered(column: str, count: int) -> list[str]:
    return [f"{column}_{number}" for number in range(1, count + 1)]


def _renamed_pair(where: str, row: dict[str, Any], form: tuple[str, ...]) -> Pair:
    return {"anchor": said(where, row, form[0]), "positive": said(where, row, form[1])}


def _pair(where: str, row: dict[str, Any], form: tuple[str, ...]) -> Pair:
    return {column: said(where, row, column) for column in form} | _negatives(where, row)


def _negatives(where: str, row: dict[str, Any]) -> Pair:
    found: Pair = {}
    for column in filter(is_negative, row):
        if not _is_list(row[column]):
            found[column] = said(where, row, column)
            continue
        texts = _texts(where, row, column, at_least=1)
        for name, text in zip(_numbered(column.removesuffix("s"), len(texts)), texts, strict=True):
            if name in row:
                raise DataError(f"{where}: {column!r} and {name!r} are both there: rename one")
            found[name] = text
    return found


def _group(where: str, row: dict[str, Any]) -> Iterator[Pair]:
    texts = _texts(where, row, "texts", at_least=2)
    for anchor, positive in combinations(texts, 2):
        yield {"anchor": anchor, "positive": positive}


def _gloss(where: str, row: dict[str, Any]) -> Iterator[Pair]:
    words = _texts(where, row, "words", at_least=1)
    yield {"anchor": ", ".join(words), "positive": said(where, row, "definition")}


def _texts(where: str, row: dict[str, Any], field: str, at_least: int) -> list[str]:
    texts = field_of(where, row, field)
    if not _is_list(texts) or len(texts) < at_least:
        raise DataError(f"{where}: '{field}' must be a list of {at_least} or more texts, got {short(texts)}")
    for place, text in enumerate(texts):
        check_said(where, f"{field}[{place}]", text)
    return list(map(str, texts))


LISTS: dict[tuple[str, ...], Callable[[str, dict[str, Any]], Iterator[Pair]]] = {
    ("texts",): _group,
    ("words", "definition"): _gloss,
}
