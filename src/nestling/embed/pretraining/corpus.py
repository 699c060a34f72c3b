"""Text of any size as batches of token windows of like length, in an order that depends on nothing but the seed.

A corpus is read in its own order, pass after pass. A pool of windows is filled from it, sorted by length, cut into
batches, and these are shuffled. Where a pool starts is all that has to be known to go on: a few numbers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from nestling.data.layout import EAST, LAYOUTS, SOUTH, Layout, Reading
from nestling.data.rows import Columns, open_rows
from nestling.data.texts import read_texts
from nestling.embed.pretraining.masking import FEWEST, Window
from nestling.errors import DataError, MaskingError, OptionError
from nestling.options import choice, flag, shown

POOL = 64  # batches
READ = 64  # texts that are tokenised at a time
UNSPACED = re.compile(f"[{EAST}{SOUTH}]")
ENOUGH = 10_000  # texts without a word to mask, in a row: the tokenizer does not know the language


class Texts:
    """Documents of several sources, one after the other, as often as one likes.

    Args:
        sources: as `nestling.data.texts.read_texts` takes them: files, names of ``datasets``, which are streamed, and
            what holds rows in memory; None for the built-in pages.
        skip_bad: leave lines out that are not as expected, and count them.
        columns, layout: as of `nestling.data.texts.read_texts`.

    Attributes:
        bad: how many lines were left out in a pass over the sources, as far as they have been read.
        left_out: how many texts were left out in the first pass, by the reason.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        skip_bad: bool = False,
        *,
        columns: Columns | None = None,
        layout: Layout = "auto",
    ):
        if isinstance(sources, str | os.PathLike):
            raise OptionError(f"sources={shown(sources)}: expected a list of files, [{shown(os.fspath(sources))}]")
        self.sources, self.skip_bad, self.bad = list(sources), flag("skip_bad", skip_bad), 0
        choice("layout", layout, LAYOUTS)
        self.columns, self.layout = columns, layout
        self.first: list[Reading] | None = None

    def __iter__(self) -> Iterator[str]:
        """Raises:
        DataError: see `read_texts`; a line that is not as expected is named, with its file, unless it is left out.
        """
        found = 0

        def skip(error: DataError) -> None:
            nonlocal found
            found += 1
            self.bad = max(self.bad, found)

        again, first = self.first is not None, self.first or []
        self.first = first
        for source in self.sources:
            reading = read_texts(source, skip if self.skip_bad else None, columns=self.columns, layout=self.layout)
            reading.quiet = again  # the first pass has said it
            if not again:
                first.append(reading)
            yield from reading

    @property
    def left_out(self) -> Counter[str]:
        return sum((reading.left_out for reading in self.first or ()), Counter())


@dataclass(frozen=True)
class Position:
    """Where the next batch starts.

    Attributes:
        turn: passes over the corpus that are behind us.
        text, window: where the pool starts: texts of this pass before it, and windows of the next one.
        pool: its number, from 0 on through all passes.
        batch: batches of the pool that have been read.
    """

    turn: int = 0
    text: int = 0
    window: int = 0
    pool: int = 0
    batch: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Windows, the random numbers that belong to them, and where to go on after them."""

    windows: list[Window]
    rng: np.random.Generator
    after: Position


class Corpus:
    """Batches of windows of a corpus.

    Texts that are longer than ``length`` tokens are cut into windows, each with special tokens of its own. Windows
    with fewer than two words that can be masked are left out.

    Args:
        texts: strings, or rows with a column ``text``, in a list, a data frame, a data set or any other iterable that
            can be read more than once.
        tokenizer: a fast one, whose words are masked whole.
        length: tokens of a window, special ones among them.
        batch_size: windows of a batch.
        seed: of the order of windows.
        pool: batches whose windows are mixed.

    Attributes:
        left_out: windows of a pass that nothing can be masked in, as far as it has been read.

    Raises:
        MaskingError: the tokenizer is not fast, has no mask token, or the length leaves no room for words.
        ValueError: the texts are one string, or can be read only once.
    """

    def __init__(self, texts: Iterable[Any], tokenizer: Any, length: int, batch_size: int, seed: int = 0, pool=POOL):
        if isinstance(texts, str | bytes):
            raise DataError("texts must be strings in a list, or an iterable of them, not one string")
        if isinstance(texts, Iterator):
            raise OptionError(
                "texts can be read only once, and are read again to resume and for a next pass: give a list, a data "
                "set, or Texts([...]) of files"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise MaskingError(
                "the tokenizer is not a fast one (of tokenizers): it does not tell which tokens are a word"
            )
        if tokenizer.mask_token_id is None:
            raise MaskingError("the tokenizer has no mask token: choose a model that was trained with one, or add one")
        if length < (least := tokenizer.num_special_tokens_to_add() + FEWEST):
            raise MaskingError(f"length={length} leaves no room for words: expected {least} tokens and more")
        self.texts, self.length = texts, length
        self.tokenizer = deepcopy(tokenizer)  # cutting into windows would leave its mark on the user's
        self.batch_size, self.seed, self.pool = batch_size, seed, pool
        self.special = np.array(sorted(tokenizer.all_special_ids))
        self.left_out = 0

    def batches(self, position: Position | None = None) -> Iterator[Batch]:
        """All batches from a position on, without end; the same ones wherever one starts.

        Raises:
            DataError: there are no texts, or one is not as expected.
            MaskingError: there is nothing to mask in any of them.
        """
        start = position or Position()
        while True:
            stream = self._windows(start)
            while pool := list(islice(stream, self.pool * self.batch_size)):
                following = replace(pool[-1][0], pool=start.pool + 1)
                yield from self._cut([window for _, window in pool], start, following)
                start = following
            start = replace(start, turn=start.turn + 1, text=0, window=0, batch=0)

    def _cut(self, pool: list[Window], start: Position, following: Position) -> Iterator[Batch]:
        """The batches of a pool that have not been read: windows of like length, in random order."""
        rng = np.random.default_rng((self.seed, start.pool))
        missing = -len(pool) % self.batch_size  # at the end of a pass, some come twice to fill the last batch
        places = np.concatenate((np.arange(len(pool)), rng.choice(len(pool), missing, missing > len(pool))))
        lengths = np.array([len(pool[place].ids) for place in places])
        places = places[np.lexsort((rng.random(len(places)), lengths))]
        batches = rng.permutation(places.reshape(-1, self.batch_size))
        for number in range(start.batch, len(batches)):
            after = replace(start, batch=number + 1) if number + 1 < len(batches) else following
            own = np.random.default_rng((self.seed, start.pool, number))
            yield Batch([pool[place] for place in batches[number]], own, after)

    def _windows(self, start: Position) -> Iterator[tuple[Position, Window]]:
        """Windows of the rest of a pass, each with the position behind it."""
        texts = (row for _, row in open_rows(self.texts).rows)
        empty, left_out, in_a_row = not (start.text or start.window), 0, 0
        for _ in islice(texts, start.text):
            pass
        number, skipped = start.text, start.window
        while some := list(islice(texts, READ)):
            for windows in self._tokenized(some, number):
                for place, window in enumerate(windows):
                    if place < skipped:
                        continue
                    if window.words.max(initial=-1) + 1 < FEWEST:
                        left_out, in_a_row = left_out + 1, in_a_row + 1
                        if in_a_row == ENOUGH:
                            raise self._nothing(left_out)
                        continue
                    empty, in_a_row = False, 0
                    last = place + 1 == len(windows)
                    yield replace(start, batch=0, text=number + last, window=0 if last else place + 1), window
                number, skipped = number + 1, 0
        self.left_out = max(self.left_out, left_out)
        if empty and left_out:
            raise self._nothing(left_out)
        if empty:
            raise DataError("there are no texts: expected some to train on")

    @staticmethod
    def _nothing(count: int) -> MaskingError:
        return MaskingError(
            f"there is nothing to mask in {count} texts: each has fewer than {FEWEST} words that the tokenizer knows"
        )

    def _tokenized(self, texts: list[Any], number: int) -> Iterator[list[Window]]:
        """The windows of each text, ``number`` of the first one on."""
        strings = [_text_of(text, place) for place, text in enumerate(texts, number + 1)]
        unspaced = [bool(UNSPACED.search(text)) for text in strings]
        found = self.tokenizer(
            strings, truncation=True, max_length=self.length, return_overflowing_tokens=True, verbose=False,
            return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=any(unspaced),
        )  # fmt: skip
        windows: list[list[Window]] = [[] for _ in strings]
        for place, of in enumerate(found["overflow_to_sample_mapping"]):
            words = found.word_ids(place)
            if unspaced[of]:
                words = _words(words, found["offset_mapping"][place], strings[of])
            windows[of].append(self._window(found["input_ids"][place], words))
        yield from windows

    def _window(self, ids: list[int], words: list[int | None]) -> Window:
        numbers = np.array([-1 if word is None else word for word in words])
        tokens = np.array(ids)
        numbers[np.isin(tokens, self.special)] = -1
        kept = numbers >= 0
        numbers[kept] = np.unique(numbers[kept], return_inverse=True)[1]
        return Window(tokens, numbers)


def _words(words: list[int | None], places: list[tuple[int, int]], text: str) -> list[int | None]:
    """Words where scripts have no spaces between them: to many tokenizers, a whole sentence is one.

    Each token of such a script is taken for a word of its own.
    """
    return [
        None if word is None else word * len(words) + (number if UNSPACED.search(text, *place) else 0)
        for number, (word, place) in enumerate(zip(words, places, strict=True))
    ]


def _text_of(row: Any, number: int) -> str:
    text = row.get("text") if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        expected = "a string, or a row with a string 'text'"
        raise DataError(f"text {number}: expected {expected}, got {row!r:.60}")
    return text
