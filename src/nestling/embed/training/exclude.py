"""Texts that must not be trained on, since they are measured on: sentences of evaluation sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestling.data.jsonl import short
from nestling.data.rows import open_rows
from nestling.data.texts import TEXT, read_texts
from nestling.embed.training.data import Examples
from nestling.errors import DataError, ExampleError

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LEFT_OUT = "texts that are measured on"


def without(examples: Examples, excluded: Any) -> Examples:
    """Examples of texts without those that are excluded; case, punctuation and spaces do not count.

    Args:
        excluded: texts; the name of a file of texts or rows, all of whose columns of texts count; or several names
            (as ``pathlib.Path``). The sentences of a longer text are excluded as well.

    Raises:
        DataError: a file cannot be read.
        ExampleError: fewer than two texts are left.
    """
    if excluded is None:
        return examples
    known = {_key(part) for text in _texts(excluded) for part in (text, *SENTENCE_END.split(text))}
    known.discard("")
    every = examples.columns["text"]
    kept = [text for text in every if _key(text) not in known]
    if len(kept) < 2:
        raise ExampleError(f"{len(kept)} of {len(every)} texts are left without the excluded ones: give others")
    left_out = {**examples.left_out, LEFT_OUT: len(every) - len(kept)} if len(kept) < len(every) else examples.left_out
    return replace(examples, columns={"text": kept}, left_out=left_out)


def _key(text: str) -> str:
    return " ".join(WORD.findall(text.casefold()))


def _texts(excluded: Any) -> Iterator[str]:
    if isinstance(excluded, str | Path):
        yield from _of_file(str(excluded))
        return
    if not isinstance(excluded, Iterable):
        raise DataError(f"exclude={short(excluded)}: expected texts, or the name of a file of them")
    for item in excluded:
        if isinstance(item, Path):
            yield from _of_file(str(item))
        elif isinstance(item, str):
            yield item
        else:
            raise DataError(f"exclude has {short(item)}: expected texts, or the name of a file of them")


def _of_file(name: str) -> Iterator[str]:
    if name.lower().endswith(TEXT):
        yield from read_texts(name, layout="lines")
        return
    for _, row in open_rows(name).rows:
        yield from (value for value in (row.values() if isinstance(row, dict) else [row]) if isinstance(value, str))
