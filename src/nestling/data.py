"""Readers of plain data files: text to calibrate, train and measure on, and multiple-choice questions."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nestling.errors import DataError
from nestling.records import (
    JSONL,
    Skip,
    check_file,
    check_text,
    field_of,
    lines,
    not_empty,
    objects,
    reason,
    refuse,
    short,
    text_of,
)

TEXT = (".txt", ".txt.gz")


def read_texts(source: str | os.PathLike[str] | None = None, skip: Skip | None = None) -> Iterator[str]:
    """Yield documents, one string each, never blank, always in the same order.

    Args:
        source: one of

            * a ``.txt`` or ``.txt.gz`` file in UTF-8: each block of lines between blank lines is a document;
            * a ``.jsonl`` or ``.jsonl.gz`` file: the field ``text`` of each line's object;
            * the name of a ``datasets`` data set, ``NAME[:CONFIG[:SPLIT]]`` (split ``train`` by default), streamed:
              the column ``text`` (needs ``nestling[data]``);
            * None: the English help pages in ``pydoc_data.topics`` of the standard library, 0.5 MB, by name. They
              differ a little from one Python to the next.

        skip: called with the error of each line that is not as described, which is then left out; None stops there.

    Raises:
        DataError: on the call if there is no such file or data set; while iterating if the file is empty, damaged, not
            UTF-8, or a line is not as described. What came before the bad line has been yielded by then.
    """
    if source is None:
        return _help_pages()
    name = os.fspath(source)
    suffix = name.lower()
    if suffix.endswith(TEXT):
        check_file(name)
        return not_empty(name, _blocks(name, skip))
    if suffix.endswith(JSONL):
        check_file(name)
        return not_empty(name, _json_texts(name, skip))
    if os.path.isfile(name) or not name.strip():
        raise DataError(f"{name or '(empty name)'}: unknown kind of file; expected {', '.join(TEXT + JSONL)}")
    return not_empty(name, _dataset(name, skip))


def read_multiple_choice(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read multiple-choice questions from a ``.jsonl`` or ``.jsonl.gz`` file.

    Each line is an object with ``question`` (text), ``choices`` (at least two texts) and ``answer`` (the 0-based place
    of the right choice). Other fields are ignored.

    Returns:
        One ``{"question": str, "choices": list[str], "answer": int}`` for each line, in the file's order.

    Raises:
        DataError: the file is missing, empty or damaged, or a line is not as described.
    """
    name = os.fspath(path)
    if not name.lower().endswith(JSONL):
        raise DataError(f"{name}: unknown kind of file; expected {' or '.join(JSONL)}")
    check_file(name)
    return list(not_empty(name, _questions(name)))


def _help_pages() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _blocks(name: str, skip: Skip | None) -> Iterator[str]:
    block: list[str] = []
    for _, line in lines(name, skip):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block).strip()
            block = []
    if block:
        yield "\n".join(block).strip()


def _json_texts(name: str, skip: Skip | None) -> Iterator[str]:
    return _said(objects(name, skip), skip)


def _said(rows: Iterable[tuple[str, Any]], skip: Skip | None) -> Iterator[str]:
    """The texts of rows, each beside where it is; blank ones are left out."""
    for where, row in rows:
        try:
            text = text_of(where, row, "text")
        except DataError as error:
            refuse(error, None, skip)
            continue
        if text.strip():
            yield text


def _questions(name: str) -> Iterator[dict[str, Any]]:
    for where, row in objects(name):
        question = text_of(where, row, "question")
        choices, answer = field_of(where, row, "choices"), field_of(where, row, "answer")
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"{where}: 'choices' must be a list of two or more texts, got {short(choices)}")
        for place, choice in enumerate(choices):
            check_text(where, f"choices[{place}]", choice)
        if not isinstance(answer, int) or isinstance(answer, bool):
            raise DataError(f"{where}: 'answer' must be an integer, got {short(answer)}")
        if not 0 <= answer < len(choices):
            raise DataError(f"{where}: 'answer' must be in 0..{len(choices) - 1} (it counts from 0), got {answer}")
        if not question.strip() or not all(choice.strip() for choice in choices):
            raise DataError(f"{where}: 'question' or one of 'choices' is blank")
        yield {"question": question, "choices": choices, "answer": answer}


def _dataset(name: str, skip: Skip | None) -> Iterator[str]:
    if not importlib.util.find_spec("datasets"):
        raise DataError(
            f"{name}: no such file ({', '.join(TEXT + JSONL)}); to read it as a data set: pip install 'nestling[data]'"
        )
    import datasets

    path, config, split = (name.split(":") + ["", ""])[:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library and its file readers raise all kinds
        raise DataError(
            f"{name}: neither a file ({', '.join(TEXT + JSONL)}) nor a data set that can be opened, "
            f"NAME[:CONFIG[:SPLIT]] [{reason(error)}]"
        ) from error
    return _column(name, rows, skip)


def _column(name: str, rows: Any, skip: Skip | None) -> Iterator[str]:
    return _said(_numbered(name, rows), skip)


def _numbered(name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise TypeError(f"expected a row of columns, got {short(row)}")
            yield f"{name}, row {number}", row
    except Exception as error:
        raise DataError(f"{name}: reading stopped after row {number} [{reason(error)}]") from error
