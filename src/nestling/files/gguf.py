"""The header of a GGUF file, walked through before the library of that name reads it.

That one believes what a header says of lengths: of a file that is cut off it reads on, for ever and into memory.
"""

import mmap
import struct
from pathlib import Path

from nestling.errors import FileError
from nestling.files.reading import check_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
SMALLEST = 24  # bytes: magic, version, number of tensors, number of metadata entries
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by the number of their type
STRING, ARRAY = 8, 9
ENTRIES = 5_000_000  # of all arrays together: vocabularies have some hundred thousands
DIMENSIONS = 4


def check_gguf(path: Path) -> int:
    """Walk through the header of a GGUF file.

    Returns:
        The number of its tensors.

    Raises:
        FileError: it is not such a file, or speaks of more than it holds; it is named.
    """
    size = check_regular(path)
    try:
        with open(path, "rb") as file:
            if (start := file.read(len(MAGIC))) != MAGIC:
                raise FileError(f"{path}: not a GGUF file (it starts with {start!r})")
            if size < SMALLEST:
                raise FileError(f"{path}: the GGUF file is truncated ({size} bytes); get it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Walk(content).tensors()
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, struct.error) as error:
        raise FileError(f"{path}: the GGUF file is truncated or damaged ({error}); get it again") from error


class _Walk:
    """A place in the content of a file. Raises ValueError where something does not fit into it."""

    def __init__(self, content: mmap.mmap):
        self.content, self.place, self.entries = content, len(MAGIC), 0
        self.order = "<" if self.content[4:6] != b"\0\0" else ">"

    def tensors(self) -> int:
        """The number of tensors, all of which begin within the file and have no more numbers than it has bits."""
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"version {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, entries = self.number("Q"), self.number("Q")
        for _ in range(self.fitting(entries, 12)):
            self.text()
            self.value(self.number("I"))
        size = len(self.content)
        for _ in range(self.fitting(tensors, 24)):
            self.text()
            numbers = 1
            for _ in range(self.at_most(self.number("I"), DIMENSIONS, "dimensions")):
                numbers *= self.number("Q")
            self.number("I")
            if self.number("Q") > size or numbers > 8 * size:
                raise ValueError("a tensor lies beyond the end of the file")
        return tensors

    def number(self, form: str) -> int:
        (found,) = struct.unpack_from(self.order + form, self.content, self.place)
        self.place += struct.calcsize(self.order + form)
        return found

    def text(self) -> None:
        self.skip(self.number("Q"), 1)

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            self.entries += self.at_most(count, ENTRIES - self.entries, "entries")
            if kind == STRING:
                for _ in range(self.fitting(count, 8)):
                    self.text()
            else:
                self.skip(count, self.size_of(kind))
        else:
            self.skip(1, self.size_of(kind))

    def size_of(self, kind: int) -> int:
        if kind not in SCALARS:
            raise ValueError(f"unknown type {kind}")
        return SCALARS[kind]

    def skip(self, count: int, each: int) -> None:
        self.place += self.fitting(count, each) * each

    def fitting(self, count: int, each: int) -> int:
        if count * each > len(self.content) - self.place:
            raise ValueError("it says that it is longer than it is")
        return count

    def at_most(self, count: int, most: int, what: str) -> int:
        if count > most:
            raise ValueError(f"{count} {what}, expected at most {most}")
        return count
