"""What an encoder is trained on: rows of texts, checked, and the order in which they make batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.errors import DataError, ExampleError
from nestling.records import check_said, short

LABELS = ("label", "labels", "score", "scores")  # the columns that sentence-transformers reads as labels
FORMS = {("sentence1", "sentence2"): "scored", ("anchor", "positive"): "pairs", ("query", "passage"): "pairs"}
PATIENCE = 8  # rows that wait for another batch, in batches; above that they are taken though a text comes twice


@dataclass(frozen=True)
class Examples:
    """Columns of texts and perhaps labels.

    Attributes:
        kind: ``"texts"`` (strings), ``"pairs"`` (anchor, positive or query, passage, perhaps negatives), ``"scored"``
            (sentence1, sentence2, score), or ``"rows"`` (columns of the user's own, for a loss of the user's own).
        columns: texts by column, in the order in which losses see them.
        labels: one for each row, or None.
    """

    kind: Literal["texts", "pairs", "scored", "rows"]
    columns: dict[str, list[str]]
    labels: list[Any] | None = None

    @classmethod
    def of(cls, data: Iterable[str] | Iterable[Mapping[str, Any]], own_loss: bool = False) -> Examples:
        """Rows as the readers give them, or strings.

        Args:
            data: strings (each is taken once), or rows of `read_pairs` or `read_sts`. With a loss of one's own, rows
                with any columns of texts, all of which it gets, and at most one of `LABELS`. Columns of numbers that
                are no labels, such as ids, are left out.
            own_loss: whether there is one.

        Raises:
            ExampleError: there are no rows, one lacks a column, has one more or is of another kind, a text is blank,
                all texts are the same, or all scores are.
        """
        if isinstance(data, str | Mapping):
            raise ExampleError(f"expected a list of texts or of rows, got one {type(data).__name__}")
        rows = list(data)
        if not rows:
            raise ExampleError("there is nothing to train on: expected texts, pairs or scored pairs, got none")
        try:
            if isinstance(rows[0], str):
                made = cls("texts", {"text": list(dict.fromkeys(_texts(rows)))})
            else:
                made = _table(rows, own_loss)
        except DataError as error:  # of a text
            raise ExampleError(f"{error}: give a text, or leave the row out") from None
        if len({text for column in made.columns.values() for text in column}) < 2:
            raise ExampleError(f"all texts are the same, {short(next(iter(made.columns.values()))[0])}: give others")
        if made.kind == "scored" and len(set(made.labels or ())) < 2:
            raise ExampleError("all scores are the same: pairs without an order teach nothing, give read_pairs rows")
        return made

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def texts(self) -> list[str]:
        """All texts, column after column."""
        return [text for column in self.columns.values() for text in column]


def order(examples: Examples, batch_size: int, steps: int, seed: int) -> Tensor:
    """Row numbers of all batches of a training, one batch after the other: ``[steps * batch_size]``.

    Passes over the rows follow each other, each in an order of its own. Within a batch no text comes twice, so that no
    text is a wrong answer to itself; rows that would bring one wait for a later batch. Only where too many wait, since
    most rows share a text, are they taken anyway.

    The whole order is known beforehand, so a training that is resumed, or that runs on several processes which share
    each batch, sees the same batches.
    """
    numbers: dict[str, int] = {}
    rows = list(
        zip(
            *([numbers.setdefault(text, len(numbers)) for text in column] for column in examples.columns.values()),
            strict=True,
        )
    )
    coming = _passes(len(rows), seed)
    waiting: list[int] = []
    found: list[int] = []
    for _ in range(steps):
        batch: list[int] = []
        seen: set[int] = set()
        held, waiting = waiting, []
        while len(batch) < batch_size:
            row = held.pop(0) if held else next(coming)
            if seen.isdisjoint(rows[row]) or len(waiting) >= PATIENCE * batch_size:
                batch.append(row)
                seen.update(rows[row])
            else:
                waiting.append(row)
        waiting += held
        found += batch
    return torch.tensor(found)


def _passes(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _texts(rows: Sequence[Any]) -> Iterator[str]:
    for number, text in enumerate(rows, 1):
        check_said(f"text {number}", "text", text)
        yield text


def _table(rows: Sequence[Any], own_loss: bool) -> Examples:
    """Columns of rows that are mappings."""
    if not isinstance(rows[0], Mapping):
        raise ExampleError(f"row 1 is {short(rows[0])}: expected a text, or a mapping of columns")
    kind, names, label = _form(rows[0], own_loss)
    wanted = [*names, *([label] if label else [])]
    columns: dict[str, list[str]] = {name: [] for name in names}
    labels = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not all(name in row for name in wanted):
            had = ", ".join(row) if isinstance(row, Mapping) else short(row)
            raise ExampleError(f"row {number} has {had or 'no columns'}: expected {', '.join(wanted)}, as in row 1")
        others = [name for name in row if name not in wanted]
        if more := [name for name in others if name in LABELS or _is_content(name, row[name])]:
            raise ExampleError(
                f"row {number} has {', '.join(more)} beside {', '.join(wanted)}: nothing would be learned of that, "
                "leave it out, have it in every row as negative, or give a loss that takes it"
            )
        for name in names:
            check_said(f"row {number}", name, row[name])
            columns[name].append(row[name])
        if label:
            _check_label(f"row {number}: {label!r}", row[label])
            labels.append(row[label])
    return Examples(kind, columns, labels if label else None)  # type: ignore[arg-type]


def _form(row: Mapping[str, Any], own_loss: bool) -> tuple[str, list[str], str | None]:
    """Kind, columns of texts and the column of labels, told by the first row."""
    content = [name for name in row if name not in LABELS and _is_content(name, row[name])]
    labels = [name for name in LABELS if name in row]
    for names, kind in FORMS.items():
        label = ["score"] if kind == "scored" else []
        columns = [*names, *(name for name in content if not label and name.startswith("negative"))]
        others = set(content) - set(columns)  # which a loss of one's own may take
        if all(name in row for name in names) and labels == label and not (own_loss and others):
            return kind, columns, labels[0] if labels else None
    if not own_loss:
        expected = "sentence1, sentence2, score; anchor, positive; query, passage"
        raise ExampleError(
            f"row 1 has {', '.join(row) or 'no columns'}: expected {expected}; or texts; for other rows, give a loss"
        )
    if len(labels) > 1 or not content:
        raise ExampleError(f"row 1 has {', '.join(row) or 'no columns'}: expected texts and at most one of {LABELS}")
    return "rows", content, labels[0] if labels else None


def _is_content(name: str, value: Any) -> bool:
    """Whether a column has something to learn from: not numbers such as ids, nor the subset that `read_sts` tells."""
    return name != "subset" and not isinstance(value, Number)


def _check_label(where: str, label: Any) -> None:
    numbers = label if isinstance(label, list | tuple) else [label]
    for number in numbers:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ExampleError(f"{where} must be a finite number or a list of numbers, got {short(label)}")
