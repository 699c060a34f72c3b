"""What an encoder is trained on: rows of texts, checked, and the order in which they make batches."""

from __future__ import annotations

import math
import numbers
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.data.jsonl import check_said, short
from nestling.data.pairs import FORMS, LABELS, PLAIN, SCORED, named_rows, positives, said, scored
from nestling.data.positives import plain_label
from nestling.data.rows import Source, is_negative, open_rows
from nestling.data.told import BESIDE, tell_left_out
from nestling.errors import DataError, ExampleError

KNOWN = ("sentence1", "sentence2", *chain.from_iterable(PLAIN))
PATIENCE = 8  # rows that wait for another batch, in batches; above that they are taken though a text comes twice


@dataclass(frozen=True)
class Examples:
    """Columns of texts and perhaps labels.

    Attributes:
        kind: ``"texts"`` (strings), ``"pairs"`` (anchor, positive or query, passage, perhaps negatives), ``"scored"``
            (sentence1, sentence2, score), or ``"rows"`` (columns of the user's own, for a loss of the user's own).
        columns: texts by column, in the order in which losses see them.
        labels: one for each row, or None.
        left_out: how many rows, or columns of how many rows, were left out, by the reason.
    """

    kind: Literal["texts", "pairs", "scored", "rows"]
    columns: dict[str, list[str]]
    labels: list[Any] | None = None
    left_out: dict[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, data: Any, own_loss: bool = False) -> Examples:
        """Whatever `nestling.data.rows.open_rows` takes, but for names of files, and what the readers give.

        Args:
            data: texts, also in a column ``text`` (each is taken once), or rows as `read_sts` and `read_pairs` tell:
                of a list, a data frame, a data set of `datasets`, ... With a loss of one's own, rows with any
                columns of texts, all of which it gets, and at most one of `LABELS`. Columns of numbers that are no
                labels, such as ids, are left out, and so is what says where a row is from.
            own_loss: whether there is one.

        Raises:
            ExampleError: there are no rows, one lacks a column, has one that would be lost or is of another kind, a
                text is blank, all texts are the same, or all scores are.
        """
        if isinstance(data, Examples):
            return data
        if isinstance(data, str | os.PathLike):
            raise ExampleError(
                f"expected a list of texts or of rows, got one {type(data).__name__}, {short(data)}: if that is a "
                "file, read it with read_pairs, read_sts or read_texts"
            )
        try:
            made = cls._read(open_rows(data), own_loss, getattr(data, "left_out", {}))
        except DataError as error:
            raise ExampleError(str(error)) from None
        if len({text for column in made.columns.values() for text in column}) < 2:
            raise ExampleError(f"all texts are the same, {short(next(iter(made.columns.values()))[0])}: give others")
        if made.kind == "scored" and len(set(made.labels or ())) < 2:
            raise ExampleError("all scores are the same: pairs without an order teach nothing, give read_pairs rows")
        return made

    @classmethod
    def _read(cls, source: Source, own_loss: bool, before: Mapping[str, int]) -> Examples:
        """``before`` is what a reader has left out of the rows that it gave."""
        first = next(source.rows, None)
        if first is None:
            raise ExampleError("there is nothing to train on: expected texts, pairs or scored pairs, got none")
        source = replace(source, rows=chain([first], source.rows))
        row = first[1]
        if isinstance(row, str):
            made = cls("texts", {"text": _texts(source)})
        elif own_loss:
            made = _table(source)
        elif isinstance(row, dict) and "text" in row and not any(set(form) <= set(row) for form in (*FORMS, SCORED)):
            made = cls("texts", {"text": _texts(source)})
        elif _is_scored(row):
            rows = list(scored(source))
            texts = {column: [pair[column] for pair in rows] for column in SCORED[:2]}
            made = cls("scored", texts, [pair["score"] for pair in rows])
        else:
            pairs = list(positives(source))
            made = cls("pairs", {column: [pair[column] for pair in pairs] for column in pairs[0]})
        tell_left_out(source.name, source.left_out)
        return replace(made, left_out=dict(source.left_out + Counter(before)))

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


def _texts(source: Source) -> list[str]:
    """Each text once."""
    found: dict[str, None] = {}
    for number, (where, row) in enumerate(source.rows, 1):
        text = row
        if isinstance(row, dict):
            text = said(where, row, "text")
            source.left_out.update(f"column {name}" for name in row if name != "text")
        check_said(f"text {number}", "text", text)
        if text in found:
            source.left_out["texts that are there twice"] += 1
        found[text] = None
    return list(found)


def _is_scored(row: Any) -> bool:
    if isinstance(row, tuple) and len(row) == 3 and not isinstance(row[2], str):
        if plain_label(row[2]) is not None:  # 0 may mean entailment, and then be the best of all
            raise ExampleError(
                f"row 1 is {short(row)}: it is not known what the number is; if a score, give read_sts(rows), if a "
                "label, rows with the columns premise, hypothesis, label"
            )
        return True
    return isinstance(row, dict) and all(column in row for column in SCORED)


def _table(source: Source) -> Examples:
    """All columns of texts, and one of labels, for a loss of one's own."""
    rows = named_rows(source, ("anchor", "positive"))
    first = next(rows)
    names, labelled = _columns(*first)
    kind = _kind(names, labelled)
    columns: dict[str, list[str]] = {name: [] for name in names}
    labels = []
    for where, row in chain([first], rows):
        if missing := [name for name in (*names, *labelled) if name not in row]:
            raise ExampleError(
                f"{where} has no {missing[0]!r}, as row 1 has: it has {', '.join(map(str, row)) or 'no columns'}"
            )
        for name in row:
            if name in names or name in labelled:
                continue
            if name in LABELS or _is_content(name, row[name]):
                raise ExampleError(f"{where} has {name!r}, which row 1 has not: have it in every row, or in none")
            source.left_out[f"column {name}"] += 1
        for name in names:
            columns[name].append(said(where, row, name))
        if labelled:
            labels.append(_label(f"{where}: {labelled[0]!r}", row[labelled[0]]))
    return Examples(kind, columns, labels if labelled else None)


def _columns(where: str, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The columns of texts, those of known names first, and that of labels, if there is one."""
    found = [name for name in row if name not in LABELS and _is_content(name, row[name])]
    labelled = [name for name in LABELS if name in row]
    if len(labelled) > 1 or not found:
        raise ExampleError(
            f"{where} has {', '.join(map(str, row)) or 'no columns'}: expected texts and at most one of {LABELS}"
        )
    return [*(name for name in KNOWN if name in found), *(name for name in found if name not in KNOWN)], labelled


def _kind(names: list[str], labelled: list[str]) -> Literal["pairs", "scored", "rows"]:
    """What the columns are; anything but pairs and scored pairs is a matter between the user and the loss."""
    if labelled:
        return "scored" if labelled == ["score"] and tuple(names) == SCORED[:2] else "rows"
    negatives = all(map(is_negative, names[2:]))
    return "pairs" if tuple(names[:2]) in PLAIN and negatives else "rows"


def _is_content(name: str, value: Any) -> bool:
    """Whether a column has something to learn from: no numbers such as ids, nor what says where a row is from."""
    return f"column {name}" not in BESIDE and not isinstance(value, numbers.Number)


def _label(where: str, label: Any) -> Any:
    """A finite number, or a list of such, as Python has them."""
    plain = label.tolist() if hasattr(label, "tolist") else label
    several = isinstance(plain, list | tuple)
    for number in plain if several else [plain]:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ExampleError(f"{where} must be a finite number or a list of numbers, got {short(label)}")
    return list(plain) if several else plain
