"""Text that is not ours (names of files, models and columns, what a model says) as a terminal or page may show it.

A name can hold line breaks, escape sequences that take over a terminal, and marks that turn the order of letters.
"""

import unicodedata

# Control characters, halves of surrogate pairs, marks of format and direction, separators of lines and paragraphs.
HIDDEN = {"Cc", "Cs", "Cf", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # belong to words in Persian and Hindi, and to emoji
MARKS = "\u200e\u200f\u061c"  # belong to text in Arabic and Hebrew


def visible(text: str) -> str:
    r"""A name or a message as one line: what cannot be seen is spelled out as Python does, ``\x1b``, ``\n``."""
    return _spelled(text, JOINERS)


def visible_lines(text: str) -> str:
    """The same for text of several lines: line breaks, tabs and plain marks of direction stay."""
    return _spelled(text, JOINERS + MARKS + "\n\t")


def _spelled(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in HIDDEN and char not in kept
        else char
        for char in text
    )
