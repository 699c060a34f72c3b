"""Readers of sentence pairs: scored ones (STS), to measure on, and positive ones, to train on.

All files are ``.jsonl`` or ``.jsonl.gz``, one object a line; fields that are not named here are ignored.
"""

import math
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from nestling.errors import DataError
from nestling.records import JSONL, check_file, check_said, field_of, not_empty, objects, short, text_of

Pair = dict[str, str]
COLUMNS = ("anchor", "positive", "negative")
POSITIVE = (1, "1", "entailment")  # labels of a positive pair; a pair with any other label is left out


def read_sts(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read scored sentence pairs: ``sentence1, sentence2`` (texts), ``score`` (a number), perhaps ``subset`` (a text).

    Scores may be on any scale; what is measured on them, Spearman's correlation, reads their order.

    Returns:
        One ``{"sentence1": str, "sentence2": str, "score": float[, "subset": str]}`` for each line, in order.

    Raises:
        DataError: the file is missing, empty or damaged, or a line is not as described.
    """
    name = _checked(path)
    return list(not_empty(name, _scored(name)))


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read positive pairs or triplets for contrastive training.

    A file has one of these forms, told by its first line; each of its lines must have the form's fields:

    * ``anchor, positive`` or ``anchor, positive, negative``;
    * ``query, passage``, which keep these names: a model may have a prompt for each;
    * ``texts``, a list of texts that mean the same: every two of them are a pair;
    * ``text1, text2, label`` or ``premise, hypothesis, label``: pairs labelled 1 or "entailment", others are left out;
    * ``words, definition``: a dictionary's terms, joined by commas, and their meaning.

    Returns:
        ``{"anchor": str, "positive": str[, "negative": str]}``, or ``{"query": str, "passage": str}``, the same
        columns in every row, in the file's order.

    Raises:
        DataError: the file is missing, empty or damaged, has another form, a text is blank, or no pair is positive.
    """
    name = _checked(path)
    return list(not_empty(name, _positive(name), "positive pair"))


def _checked(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not name.lower().endswith(JSONL):
        raise DataError(f"{name}: unknown kind of file; expected {' or '.join(JSONL)}")
    check_file(name)
    return name


def _scored(name: str) -> Iterator[dict[str, Any]]:
    for where, row in objects(name):
        pair: dict[str, Any] = {field: _said(where, row, field) for field in ("sentence1", "sentence2")}
        score = field_of(where, row, "score")
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise DataError(f"{where}: 'score' must be a finite number, got {short(score)}")
        pair["score"] = float(score)
        if "subset" in row:
            pair["subset"] = text_of(where, row, "subset")
        yield pair


def _positive(name: str) -> Iterator[Pair]:
    read: Callable[[str, dict[str, Any]], Iterator[Pair]] | None = None
    for where, row in objects(name):
        if read is None:
            form = next((fields for fields in FORMS if all(field in row for field in fields)), None)
            if form is None:
                expected = "; ".join(", ".join(fields) for fields in FORMS)
                raise DataError(
                    f"{where}: fields {', '.join(map(repr, row)) or 'none'} are no form of pair; expected {expected}"
                )
            read = FORMS[form]
        yield from read(where, row)


def _plain(*fields: str, columns: tuple[str, ...] = COLUMNS) -> Callable[[str, dict[str, Any]], Iterator[Pair]]:
    """Reader of a form whose fields are, in order, those columns, of which the last may be missing."""

    def read(where: str, row: dict[str, Any]) -> Iterator[Pair]:
        yield {column: _said(where, row, field) for column, field in zip(columns, fields, strict=False)}

    return read


def _labelled(first: str, second: str) -> Callable[[str, dict[str, Any]], Iterator[Pair]]:
    read = _plain(first, second)

    def read_positive(where: str, row: dict[str, Any]) -> Iterator[Pair]:
        label = field_of(where, row, "label")
        if not isinstance(label, int | str):
            raise DataError(f"{where}: 'label' must be an integer or a text, got {short(label)}")
        pairs = list(read(where, row))  # the texts are checked in any case
        yield from pairs if label in POSITIVE else ()

    return read_positive


def _group(where: str, row: dict[str, Any]) -> Iterator[Pair]:
    texts = _texts(where, row, "texts", at_least=2)
    for anchor, positive in combinations(texts, 2):
        yield {"anchor": anchor, "positive": positive}


def _gloss(where: str, row: dict[str, Any]) -> Iterator[Pair]:
    words = _texts(where, row, "words", at_least=1)
    yield {"anchor": ", ".join(words), "positive": _said(where, row, "definition")}


def _texts(where: str, row: dict[str, Any], field: str, at_least: int) -> list[str]:
    texts = field_of(where, row, field)
    if not isinstance(texts, list) or len(texts) < at_least:
        raise DataError(f"{where}: '{field}' must be a list of {at_least} or more texts, got {short(texts)}")
    for place, text in enumerate(texts):
        check_said(where, f"{field}[{place}]", text)
    return texts


def _said(where: str, row: dict[str, Any], field: str) -> str:
    text = field_of(where, row, field)
    check_said(where, field, text)
    return text


# In the order in which they are tried: a triplet is also a pair.
FORMS: dict[tuple[str, ...], Callable[[str, dict[str, Any]], Iterator[Pair]]] = {
    ("anchor", "positive", "negative"): _plain("anchor", "positive", "negative"),
    ("anchor", "positive"): _plain("anchor", "positive"),
    ("query", "passage"): _plain("query", "passage", columns=("query", "passage")),
    ("texts",): _group,
    ("text1", "text2", "label"): _labelled("text1", "text2"),
    ("premise", "hypothesis", "label"): _labelled("premise", "hypothesis"),
    ("words", "definition"): _gloss,
}
