"""The fenced blocks of the pages that users read."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the output that follows it (None if the page shows none)."""

    language: str
    text: str
    line: int
    output: str | None = None


def pages() -> list[Path]:
    """README.md and everything in docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order; blocks of ``text`` are the output of the block before them."""
    text = page.read_text("utf-8")
    plain = [(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]
    result = []
    for place, (language, body, line) in enumerate(plain):
        if language == "text":
            continue
        follows = plain[place + 1] if place + 1 < len(plain) else ("", "", 0)
        result.append(Block(language, body, line, follows[1] if follows[0] == "text" else None))
    return result
