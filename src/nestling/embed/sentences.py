"""Documents cut into sentences, for encoders: what is trained on and compared where there are no pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SHORTEST, LONGEST = 4, 60  # words
END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def sentences(texts: Iterable[str], shortest: int = SHORTEST, longest: int = LONGEST) -> list[str]:
    """The sentences of documents, each once, in order.

    A paragraph is what stands between blank lines; it is cut behind full stops, question and exclamation marks that
    are followed by a capital letter. Good enough for prose in languages that have such; text of other kinds stays in
    paragraphs, or is cut into pieces of ``longest`` words.

    Args:
        shortest: sentences of fewer words are left out, as are those with fewer letters than other characters
            (code, tables, rules of dashes).
        longest: longer ones are cut.
    """
    return list(dict.fromkeys(piece for text in texts for piece in _pieces(text, shortest, longest)))


def _pieces(text: str, shortest: int, longest: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in END.split(" ".join(paragraph.split())):
            words = sentence.split()
            for start in range(0, len(words), longest):
                piece = words[start : start + longest]
                said = " ".join(piece)
                if len(piece) >= shortest and 2 * sum(map(str.isalpha, said)) > len(said):
                    yield said
