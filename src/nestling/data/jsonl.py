"""Lines and JSON objects of data files, for all readers.

Files are read line by line as bytes, so that an error can name the line whatever is wrong with it.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from nestling.errors import DataError
from nestling.files.reading import LARGEST, check_regular, parse, short

JSONL = (".jsonl", ".jsonl.gz")
PLAUSIBLE = 150  # times its size that a gzip of real text takes at most; one that is made to fill memories takes 1,000
EARLY = 4 * 2**20  # bytes up to which that is not looked at


def check_file(name: str) -> None:
    """Raise DataError unless there is a file to read."""
    check_regular(name, DataError)


def not_empty(name: str, items: Iterator[Any], what: str = "entry") -> Iterator[Any]:
    """The items; DataError if there are none."""
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise DataError(f"{name}: empty; expected at least one {what}")


Skip = Callable[[DataError], None]  # told of a line that is left out


def lines(name: str, skip: Skip | None = None) -> Iterator[tuple[str, str]]:
    """Each line of a UTF-8 file, gzipped or not, without its end, and where it is: ``"FILE, line 3"``.

    A line that is not UTF-8 ends the reading, or is left out if there is a ``skip`` to tell; so in `objects`.
    """
    check_regular(name, DataError)
    number, done, packed = 0, 0, name.lower().endswith(".gz")
    try:
        with open(name, "rb") as stored, gzip.open(stored) if packed else stored as file:
            for number, raw in enumerate(iter(lambda: file.readline(LARGEST + 1), b""), 1):
                done += len(raw)
                if len(raw) > LARGEST:
                    raise DataError(f"{name}, line {number}: longer than {LARGEST:,} bytes: break it into lines")
                if done > EARLY and done > PLAUSIBLE * stored.tell():
                    raise DataError(f"{name}: takes {PLAUSIBLE} times its size: damaged, or made to fill the memory")
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
                try:
                    text = raw.rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    bad = f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line)"
                    refuse(DataError(bad), error, skip)
                    continue
                yield f"{name}, line {number}", text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged or truncated gzip after line {number} ({error})") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def objects(name: str, skip: Skip | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a JSON Lines file, and where it is. Blank lines are skipped."""
    for where, line in lines(name, skip):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            refuse(DataError(f"{where}: not valid JSON ({error})"), error, skip)
            continue
        if not isinstance(row, dict):
            refuse(DataError(f"{where}: expected a JSON object, got {short(row)}"), None, skip)
            continue
        yield where, row


def refuse(bad: DataError, cause: Exception | None, skip: Skip | None) -> None:
    """Raise the error, or tell the one who asked to go on without the line."""
    if skip is None:
        raise bad from cause
    skip(bad)


def field_of(where: str, row: dict[str, Any], field: str) -> Any:
    """The value of a field; DataError names those that there are."""
    if field not in row:
        raise DataError(f"{where}: no field '{field}'; it has {', '.join(map(repr, row)) or 'none'}")
    return row[field]


def text_of(where: str, row: dict[str, Any], field: str) -> str:
    """The text of a field; DataError if it is none."""
    value = field_of(where, row, field)
    check_text(where, field, value)
    return value


def check_text(where: str, field: str, value: Any) -> None:
    """Raise DataError unless a value is text that a tokenizer takes."""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be text, got {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: '{field}' has half a surrogate pair at character {error.start + 1}") from error


def check_said(where: str, field: str, value: Any) -> None:
    """A text that is not blank: an empty sentence has an embedding, but no meaning."""
    check_text(where, field, value)
    if not value.strip():
        raise DataError(f"{where}: '{field}' is blank: give a text, or leave the row out")
