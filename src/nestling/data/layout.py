"""Whether texts are short ones that stand by themselves, such as titles and sentences, or documents."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal

from nestling.data.told import logger, tell_left_out
from nestling.errors import DataError
from nestling.files.reading import LARGEST

Layout = Literal["auto", "lines", "documents"]
LAYOUTS = ("auto", "lines", "documents")
HEAD, HEAD_SIZE = 1000, 1_000_000  # texts, and characters of them, that are looked at
SHORT, MOST = 40, 0.9  # words of a text that stands by itself, and how many of a source's must be such
MOST_LINES = 2_000_000  # of a document
BLOCK = 20  # lines: blocks are shorter on average, where blank lines are between documents

# Scripts without spaces between words: of the first a character, of the second some three, stand for a word.
EAST = "\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
SOUTH = "\u0e01-\u0eff\u0f40-\u0fbc\u1000-\u109f\u1780-\u17d3"
WORD = re.compile(rf"[{EAST}][^\w\s]*|[{SOUTH}]{{1,3}}[^\w\s]*|[^\s{EAST}{SOUTH}]+")


class Reading(Iterator[str]):
    """Texts as they are read, and what is to be said about them. Nothing is read before it is asked for.

    Attributes:
        left_out: how many texts were left out so far, by the reason.
        on_text: called after each text; a progress bar may be moved by it.
    """

    def __init__(self, name: str, begin: Callable[["Reading"], tuple[Layout, Iterator[str]]], quiet: bool = False):
        """``begin`` opens the source and finds out its layout; a ``quiet`` reading logs nothing."""
        self.name, self.quiet, self.left_out = name, quiet, Counter[str]()
        self.on_text: Callable[[], None] = lambda: None
        self._begin = begin
        self._begun: tuple[Layout, Iterator[str]] | None = None

    @property
    def layout(self) -> Layout:
        """``"lines"``: each text stands by itself; ``"documents"``: each may hold many sentences."""
        return self._open()[0]

    def __iter__(self) -> "Reading":
        return self

    def __next__(self) -> str:
        text = next(self._open()[1], None)
        if text is None:
            if self.left_out and not self.quiet:
                tell_left_out(self.name, self.left_out)
            self.quiet = True
            raise StopIteration
        self.on_text()
        return text

    def _open(self) -> tuple[Layout, Iterator[str]]:
        if self._begun is None:
            self._begun = self._begin(self)
        return self._begun

    def tell(self, message: str, *values: object, doubtful: bool = False) -> None:
        """Log what is taken for granted."""
        if not self.quiet:
            (logger.warning if doubtful else logger.info)(message, *values)


def of_lines(reading: Reading, stream: Iterator[tuple[str, str]], layout: Layout) -> tuple[Layout, Iterator[str]]:
    """The texts of a text file: its lines, or what stands between blank lines.

    Without a word from the user, blank lines are between documents where they are frequent; else each line is a text,
    a short one or a document.
    """
    head = _head(line for _, line in stream)
    everything = chain(head, (line for _, line in stream))
    filled = [line for line in head if line.strip()]
    gaps = sum(bool(line.strip()) and not before.strip() for before, line in zip(head, head[1:], strict=False))
    blocks = layout == "documents"
    if layout == "auto" and gaps and gaps * BLOCK >= len(filled):
        layout, blocks = "documents", True
        reading.tell("%s: what stands between blank lines is taken for a document", reading.name)
    elif layout == "auto":
        layout = "lines" if are_short(filled) else "documents"
        if len(filled) > 1:
            what = "a text of its own" if layout == "lines" else "a document"
            saying = "%s: without blank lines between documents each line is taken for %s; if not, say documents"
            reading.tell(saying, reading.name, what, doubtful=True)
    if blocks:
        return layout, _blocks(reading.name, everything)
    return layout, (line.strip() for line in everything if line.strip())


def of_texts(reading: Reading, texts: Iterator[str], layout: Layout) -> tuple[Layout, Iterator[str]]:
    """Texts that come one by one, blank ones left out; only whether they are short is to be found out."""
    head = _head(texts)
    if layout == "auto":
        layout = "lines" if are_short(head) else "documents"
        what = "short, and each is taken as it is" if layout == "lines" else "long, and taken for documents"
        reading.tell("%s: the texts are %s", reading.name, what)
    return layout, _filled(chain(head, texts), reading.left_out)


def are_short(texts: list[str]) -> bool:
    """Whether nine in ten of several texts that are not blank stand by themselves, as titles and sentences do."""
    sizes = [words(text) for text in texts if text.strip()]
    if len(sizes) < 2:
        return False  # of one nothing can be told
    return sum(size <= SHORT for size in sizes) >= MOST * len(sizes)


def words(text: str) -> int:
    """How many words a text has, in any script."""
    return sum(1 for _ in WORD.finditer(text))


def _head(texts: Iterator[str]) -> list[str]:
    head: list[str] = []
    size = 0
    while len(head) < HEAD and size < HEAD_SIZE and (text := next(texts, None)) is not None:
        head.append(text)
        size += len(text)
    return head


def _filled(texts: Iterator[str], left_out: Counter[str]) -> Iterator[str]:
    for text in texts:
        if text.strip():
            yield text
        else:
            left_out["blank texts"] += 1


def _blocks(name: str, lines: Iterator[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for line in lines:
        if line.strip():
            block.append(line)
            size = size + len(line) if len(block) > 1 else len(line)
            if size > LARGEST or len(block) > MOST_LINES:
                raise DataError(
                    f"{name}: a document of more than {LARGEST:,} characters or {MOST_LINES:,} lines: put blank lines "
                    "between documents, or read lines"
                )
        elif block:
            yield "\n".join(block).strip()
            block = []
    if block:
        yield "\n".join(block).strip()
