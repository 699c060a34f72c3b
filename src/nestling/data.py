"""Readers of plain data files: text to calibrate, train and measure on, and multiple-choice questions.

Files are read line by line as bytes, so that an error can name the line whatever is wrong with it.
"""

import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

TEXT = (".txt", ".txt.gz")
JSONL = (".jsonl", ".jsonl.gz")


class DataError(ValueError):
    """A data file cannot be used. The message names the file, the line and what was expected."""


def read_texts(source: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Yield documents, one string each, never blank, always in the same order.

    Args:
        source: one of

            * a ``.txt`` or ``.txt.gz`` file in UTF-8: each block of lines between blank lines is a document;
            * a ``.jsonl`` or ``.jsonl.gz`` file: the field ``text`` of each line's object;
            * the name of a ``datasets`` data set, ``NAME[:CONFIG[:SPLIT]]`` (split ``train`` by default), streamed:
              the column ``text`` (needs ``nestling[data]``);
            * None: the English help pages in ``pydoc_data.topics`` of the standard library, 0.5 MB, by name. They
              differ a little from one Python to the next.

    Raises:
        DataError: on the call if there is no such file or data set; while iterating if the file is empty, damaged, not
            UTF-8, or a line is not as described. What came before the bad line has been yielded by then.
    """
    if source is None:
        return _help_pages()
    name = os.fspath(source)
    suffix = name.lower()
    if suffix.endswith(TEXT):
        _check_file(name)
        return _not_empty(name, _blocks(name))
    if suffix.endswith(JSONL):
        _check_file(name)
        return _not_empty(name, _json_texts(name))
    if os.path.isfile(name) or not name.strip():
        raise DataError(f"{name or '(empty name)'}: unknown kind of file; expected {', '.join(TEXT + JSONL)}")
    return _not_empty(name, _dataset(name))


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
    _check_file(name)
    return list(_not_empty(name, _questions(name)))


def _help_pages() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _blocks(name: str) -> Iterator[str]:
    block: list[str] = []
    for _, line in _lines(name):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block).strip()
            block = []
    if block:
        yield "\n".join(block).strip()


def _json_texts(name: str) -> Iterator[str]:
    for where, row in _objects(name):
        text = _text(where, row, "text")
        if text.strip():
            yield text


def _questions(name: str) -> Iterator[dict[str, Any]]:
    for where, row in _objects(name):
        question = _text(where, row, "question")
        choices, answer = _field(where, row, "choices"), _field(where, row, "answer")
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"{where}: 'choices' must be a list of two or more texts, got {_short(choices)}")
        for place, choice in enumerate(choices):
            _check_text(where, f"choices[{place}]", choice)
        if not isinstance(answer, int) or isinstance(answer, bool):
            raise DataError(f"{where}: 'answer' must be an integer, got {_short(answer)}")
        if not 0 <= answer < len(choices):
            raise DataError(f"{where}: 'answer' must be in 0..{len(choices) - 1} (it counts from 0), got {answer}")
        if not question.strip() or not all(choice.strip() for choice in choices):
            raise DataError(f"{where}: 'question' or one of 'choices' is blank")
        yield {"question": question, "choices": choices, "answer": answer}


def _dataset(name: str) -> Iterator[str]:
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
            f"NAME[:CONFIG[:SPLIT]] [{_reason(error)}]"
        ) from error
    return _column(name, rows)


def _column(name: str, rows: Any) -> Iterator[str]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            text = _text(f"{name}, row {number}", row, "text")
            if text.strip():
                yield text
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: reading stopped after row {number} [{_reason(error)}]") from error


def _check_file(name: str) -> None:
    if not os.path.isfile(name):
        raise DataError(f"{name}: {'not a file' if os.path.exists(name) else 'no such file'}")


def _not_empty(name: str, items: Iterator[Any]) -> Iterator[Any]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise DataError(f"{name}: empty; expected at least one document or question")


def _lines(name: str) -> Iterator[tuple[str, str]]:
    """Each line of a UTF-8 file, gzipped or not, without its end, and where it is: ``"FILE, line 3"``."""
    number = 0
    try:
        with gzip.open(name, "rb") if name.lower().endswith(".gz") else open(name, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
                yield f"{name}, line {number}", raw.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged or truncated gzip after line {number} ({error})") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def _objects(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a JSON Lines file, and where it is. Blank lines are skipped."""
    for where, line in _lines(name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {_short(row)}")
        yield where, row


def _field(where: str, row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise DataError(f"{where}: no field '{field}'; it has {', '.join(map(repr, row)) or 'none'}")
    return row[field]


def _text(where: str, row: dict[str, Any], field: str) -> str:
    value = _field(where, row, field)
    _check_text(where, field, value)
    return value


def _check_text(where: str, field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be text, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: '{field}' has half a surrogate pair at character {error.start + 1}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
