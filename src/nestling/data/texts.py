"""Readers of plain data files: text to calibrate, train and measure on, and multiple-choice questions."""

import numbers
import os
from collections.abc import Iterable, Iterator
from typing import Any

from nestling.data.jsonl import Skip, check_file, check_text, field_of, lines, not_empty, refuse, short, text_of
from nestling.data.layout import LAYOUTS, Layout, Reading, of_lines, of_texts
from nestling.data.rows import FILES, Columns, open_rows
from nestling.errors import DataError, OptionError
from nestling.options import choice

TEXT = (".txt", ".txt.gz")


def read_texts(
    source: Any = None, skip: Skip | None = None, *, columns: Columns | None = None, layout: Layout = "auto"
) -> Reading:
    """Yield texts, one string each, never blank, always in the same order.

    Args:
        source: one of

            * a ``.txt`` or ``.txt.gz`` file in UTF-8: each line is a text, or, where there are blank lines between
              them, each block of lines is a document;
            * the column ``text`` of anything that `nestling.data.rows.open_rows` opens: ``.jsonl``, ``.csv``, ``.tsv``
              and ``.parquet`` files, data sets by name, data frames, lists; or texts;
            * None: the English help pages in ``pydoc_data.topics`` of the standard library, 0.5 MB, by name. They
              differ a little from one Python to the next.

        skip: called with the error of each line that is not as described, which is then left out; None stops there.
        columns: what the column is called, such as ``{"text": "body"}``.
        layout: ``"lines"``: each text, or line of a text file, stands by itself; ``"documents"``: each, or each block
            of lines, may hold many sentences; ``"auto"`` finds out from the first thousand, and logs what it took them
            for.

    Returns:
        An iterator; it tells the ``layout``, and counts what it has ``left_out``.

    Raises:
        OptionError: ``layout`` is none, or ``columns`` are of a source that has none.
        DataError: on the call if there is no such file or data set; while iterating if the file is empty, damaged, not
            UTF-8, or a line is not as described. What came before the bad line has been yielded by then.
    """
    choice("layout", layout, LAYOUTS)
    if source is None and columns:
        raise OptionError(f"columns={short(dict(columns))}: the built-in pages have no columns, leave it out")
    if source is None:
        return Reading("the built-in pages", lambda reading: ("documents", _help_pages()))
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name.lower().endswith(TEXT):
            check_file(name)
            if columns:
                raise OptionError(f"columns={short(dict(columns))}: {name} has no columns, leave it out")
            return Reading(name, lambda reading: _not_empty(name, of_lines(reading, lines(name, skip), layout)))
        if not name.strip() or (os.path.isfile(name) and not name.lower().endswith(FILES)):
            kinds = ", ".join((*TEXT, *FILES))
            raise DataError(f"{name or '(empty name)'}: unknown kind of file; expected {kinds}")
    found = open_rows(source, skip, columns, known=("text",))
    texts = _said(found.rows, skip)
    return Reading(found.name, lambda reading: _not_empty(found.name, of_texts(reading, texts, layout)))


def read_multiple_choice(source: Any) -> list[dict[str, Any]]:
    """Read multiple-choice questions from a ``.jsonl`` or ``.parquet`` file, a data set, or rows in memory.

    Each row has ``question`` (text), ``choices`` (at least two texts) and ``answer`` (the 0-based place
    of the right choice). Other fields are ignored.

    Returns:
        One ``{"question": str, "choices": list[str], "answer": int}`` for each row, in order.

    Raises:
        DataError: the file is missing, empty or damaged, or a row is not as described.
    """
    found = open_rows(source)
    return list(not_empty(found.name, _questions(found.rows)))


def _help_pages() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _not_empty(name: str, found: tuple[Layout, Iterator[str]]) -> tuple[Layout, Iterator[str]]:
    return found[0], not_empty(name, found[1])


def _said(rows: Iterable[tuple[str, Any]], skip: Skip | None) -> Iterator[str]:
    """The texts of rows, each beside where it is."""
    for where, row in rows:
        try:
            yield _text(where, row)
        except DataError as error:
            refuse(error, None, skip)


def _text(where: str, row: Any) -> str:
    if isinstance(row, dict):
        if "text" not in row:
            shown = ", ".join(map(repr, row)) or "none"
            raise DataError(
                f"{where}: no field 'text'; it has {shown}: say which one it is with columns={{'text': ...}} "
                "(on the command line --columns text=...)"
            )
        return str(text_of(where, row, "text"))  # cells, and NumPy's texts, are of classes of their own
    check_text(where, "text", row)
    return row


def _questions(rows: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected the columns question, choices and answer, got {short(row)}")
        question = text_of(where, row, "question")
        choices, answer = field_of(where, row, "choices"), field_of(where, row, "answer")
        if hasattr(choices, "tolist"):
            choices = choices.tolist()  # of numpy
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            raise DataError(f"{where}: 'choices' must be a list of two or more texts, got {short(choices)}")
        for place, option in enumerate(choices):
            check_text(where, f"choices[{place}]", option)
        if not isinstance(answer, numbers.Integral) or isinstance(answer, bool):
            raise DataError(f"{where}: 'answer' must be an integer, got {short(answer)}")
        if not 0 <= int(answer) < len(choices):
            raise DataError(f"{where}: 'answer' must be in 0..{len(choices) - 1} (it counts from 0), got {answer}")
        if not question.strip() or not all(option.strip() for option in choices):
            raise DataError(f"{where}: 'question' or one of 'choices' is blank")
        yield {"question": question, "choices": list(choices), "answer": int(answer)}
