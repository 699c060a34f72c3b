"""Files that are read whole: what may stand in the place of a JSON object, a text or weights is looked at first.

A path that a user gives may be a pipe, an endless device, a folder or a link to nothing, and a file may be damaged or
hostile. Whatever it is, reading ends within a second, in little memory, and in one error that names the file. Which
class of error that is, the caller says.
"""

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nestling.errors import FileError, NestlingError

LARGEST = 64 * 2**20  # bytes of a file, or of a line of data, that is taken into memory
PARTS = 5_000_000  # values of one JSON text: each takes many times its bytes in memory
DEEPEST = 64  # levels of brackets
DIGITS = 300  # of a whole number; longer ones are no float
AnyPath = str | os.PathLike[str]


def check_regular(path: AnyPath, error: type[NestlingError] = FileError, largest: int | None = None) -> int:
    """Bytes of a file that can be opened: not a folder, a pipe or a device, and there at all.

    Raises:
        error: it cannot be read, or is larger than ``largest``.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error(f"{path}: {'a link to nothing' if os.path.islink(path) else 'no such file'}") from None
    except OSError as cause:
        why = "its links go round in a circle" if cause.errno == errno.ELOOP else cause.strerror
        raise error(f"{path}: cannot be read ({why})") from cause
    except ValueError as cause:  # a zero byte in the name
        raise error(f"{str(path)!r} is no name of a file ({cause})") from cause
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: not a file, but {_kind(found.st_mode)}")
    if largest is not None and found.st_size > largest:
        raise error(f"{path}: {found.st_size:,} bytes, expected at most {largest:,}")
    return found.st_size


def read_text(path: AnyPath, error: type[NestlingError] = FileError, largest: int = LARGEST) -> str:
    """The text of a UTF-8 file.

    Raises:
        error: it cannot be read, is too large or is not UTF-8.
    """
    try:
        return _read(path, error, largest).decode()
    except UnicodeDecodeError as cause:
        raise error(f"{path} is damaged: not UTF-8 (byte {cause.start + 1})") from cause


def read_object(path: AnyPath, error: type[NestlingError] = FileError, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object of a UTF-8 file.

    Args:
        finite: refuse NaN and infinities, which Python writes though JSON has none.

    Raises:
        error: it cannot be read, is too large, or is not such an object.
    """
    found = read_json(path, error, finite=finite)
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: expected a JSON object, got {short(found)}")
    return found


def read_json(
    path: AnyPath, error: type[NestlingError] = FileError, *, finite: bool = True, unique: bool = True
) -> Any:
    """Any JSON value of a UTF-8 file; see `read_object` and `parse`."""
    text = read_text(path, error)
    try:
        return parse(text, finite=finite, unique=unique)
    except ValueError as cause:
        raise error(f"{path} is damaged: not valid JSON ({_first_line(cause)})") from cause


def parse(text: str, *, finite: bool = False, unique: bool = True) -> Any:
    """The value of a JSON text, in time and memory that its length bounds.

    Args:
        finite: refuse numbers that are none.
        unique: refuse keys that are twice in an object, and halves of surrogate pairs.

    Raises:
        ValueError: it is not valid, nested too deep, has too many parts or a number of hundreds of digits.
    """
    parts = sum(map(text.count, "[{,"))
    if parts > PARTS:
        raise ValueError(f"more than {PARTS:,} values")
    try:
        found = _DECODERS[finite, unique].decode(text)
        if parts > DEEPEST and isinstance(found, dict | list):
            _check_depth(found)
        if unique and "\\u" in text:
            _check_surrogates(found)
    except UnicodeEncodeError as cause:
        raise ValueError("a text has half a surrogate pair") from cause
    except RecursionError as cause:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from cause
    return found


def read_tensors(path: AnyPath, error: type[NestlingError] = FileError) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; their memory is mapped.

    Raises:
        error: it cannot be read, or its header and its bytes do not agree.
    """
    with _opened(path, error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: AnyPath, error: type[NestlingError] = FileError) -> dict[str, str]:
    """The texts in the header of a safetensors file, by name.

    Raises:
        error: as `read_tensors`.
    """
    with _opened(path, error) as file:
        return file.metadata() or {}


def tensor_shapes(path: AnyPath, error: type[NestlingError] = FileError) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors, by name: its header alone is read.

    Raises:
        error: as `read_tensors`.
    """
    with _opened(path, error) as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}


def short(value: Any, longest: int = 60) -> str:
    """The value as a message shows it: at most ``longest`` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits cannot even be spelled
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def reason(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def is_failure(error: BaseException) -> bool:
    """Whether something failed, rather than was interrupted: what panics in Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _read(path: AnyPath, error: type[NestlingError], largest: int) -> bytes:
    check_regular(path, error, largest)
    try:
        with open(path, "rb") as file:
            raw = file.read(largest + 1)
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause})") from cause
    if len(raw) > largest:  # some files of /proc say that they are empty
        raise error(f"{path}: more than {largest:,} bytes")
    return raw


def _opened(path: AnyPath, error: type[NestlingError]):
    check_regular(path, error)
    try:
        return safe_open(Path(path), "pt")
    except Exception as cause:  # SafetensorError and OSError, in some releases also others
        raise error(f"{path} is truncated or not a safetensors file ({reason(cause)})") from cause


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for found in level for item in _items(found) if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {short(twice)} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {short(digits)} is too large")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _decoder(finite: bool, unique: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_unique if unique else None,
        parse_int=_whole,
        parse_float=_finite if finite else None,
        parse_constant=_refuse if finite else None,
    )


_DECODERS = {(finite, unique): _decoder(finite, unique) for finite in (False, True) for unique in (False, True)}


def _check_surrogates(value: Any) -> None:
    """Raises UnicodeEncodeError for a text that UTF-8 cannot spell."""
    for text in _texts(value):
        text.encode()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
