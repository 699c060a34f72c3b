"""Documents cut into sentences, for encoders: what is trained on and compared where there are no pairs."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from nestling.data.jsonl import short
from nestling.data.layout import EAST, SOUTH, WORD, Reading, words
from nestling.data.rows import texts_of
from nestling.data.told import Rows
from nestling.errors import MissingExtraError, OptionError
from nestling.options import whole

SHORTEST, LONGEST = 4, 60  # words
HALF = re.compile(f"[{EAST}]")
JOINED = re.compile(rf"(?<=[{EAST}{SOUTH}])\s*\n\s*(?=[{EAST}{SOUTH}])")  # a line break in a script without spaces


def sentences(texts: Iterable[Any], shortest: int = SHORTEST, longest: int = LONGEST, *, language: str = "en") -> Rows:
    """The sentences of documents, each once, in order.

    Where `nestling.data.texts.read_texts` tells that texts stand by themselves (titles, queries, a sentence a line),
    they are taken as they are. Otherwise a paragraph is what stands between blank lines, and is cut where `sentencex`
    finds the end of a sentence, in any script.

    Args:
        texts: strings, rows with a column ``text``, or a data frame or data set of such.
        shortest: sentences of fewer words are left out, as are those with fewer letters than other characters
            (code, tables, rules of dashes). In scripts without spaces, a character of Chinese or Japanese counts as a
            word here, and four of Thai, Lao, Khmer or Burmese.
        longest: longer ones are cut; there, two characters of Chinese or Japanese count as a word.
        language: whose abbreviations are known, as a code such as ``"de"``.

    Returns:
        A list; its ``left_out`` counts what was left out, by the reason.

    Raises:
        MissingExtraError: `sentencex` is not installed.
        OptionError: a number or the language is none.
        DataError: ``texts`` holds no texts.
    """
    shortest, longest = whole("shortest", shortest), whole("longest", longest)
    if not isinstance(language, str) or not re.fullmatch(r"[a-zA-Z]{2,3}([-_].*)?", language):
        raise OptionError(f"language={short(language)}: expected a code such as 'en' or 'de'")
    left_out: Counter[str] = Counter()
    if isinstance(texts, Reading) and texts.layout == "lines":
        found: Iterable[str] = (" ".join(text.split()) for text in texts)
    else:
        found = (piece for text in texts_of(texts) for piece in _pieces(text, shortest, longest, language, left_out))
    kept: dict[str, None] = {}
    for piece in found:
        if piece in kept:
            left_out["sentences that are there twice"] += 1
        kept[piece] = None
    return Rows(kept, left_out + Counter(getattr(texts, "left_out", {})))


def _pieces(text: str, shortest: int, longest: int, language: str, left_out: Counter[str]) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _segment(language, " ".join(JOINED.sub("", paragraph).split())):
            for piece in _cut(sentence.strip(), longest):
                if words(piece) < shortest:
                    left_out[f"sentences of fewer than {shortest} words"] += 1
                elif 2 * sum(map(_is_letter, piece)) <= len(piece):
                    left_out["pieces with fewer letters than other characters"] += 1
                else:
                    yield piece


def _segment(language: str, paragraph: str) -> list[str]:
    try:
        import sentencex
    except ImportError:
        needs = "cutting documents into sentences needs sentencex: pip install 'nestling[embed]'"
        raise MissingExtraError(needs) from None
    return sentencex.segment(language, paragraph)


def _cut(sentence: str, longest: int) -> Iterator[str]:
    """Pieces of at most so many words."""
    start, used = 0, 0.0
    for word in WORD.finditer(sentence):
        size = 0.5 if HALF.match(word[0]) else 1.0
        if used + size > longest and not unicodedata.category(word[0][0]).startswith("M"):
            yield sentence[start : word.start()].strip()
            start, used = word.start(), 0.0
        used += size
    yield sentence[start:].strip()


def _is_letter(character: str) -> bool:
    """Vowel signs of Indian and other scripts are marks, and belong to letters."""
    return unicodedata.category(character)[0] in "LM"
