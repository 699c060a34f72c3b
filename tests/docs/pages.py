"""The fenced blocks of the pages that users read, and what the Python ones print."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Hours and large files become seconds here: text on a page -> what is run in its place.
SMALLER = {
    "FitConfig(tokens=65_536)": 'FitConfig(basis="balanced", tokens=512, length=256, sensitivity_length=256)',
    "TrainConfig(tokens=300_000,": "TrainConfig(tokens=512, length=256, batch_size=1,",
    "EvalConfig(": "EvalConfig(length=256, context=1024, ",
    "steps=500": "steps=3",
    "steps=1_500": "steps=2",
}
FILES = {
    "pairs.jsonl": "".join(json.dumps({"anchor": f"bird {n}", "positive": f"nest {n}"}) + "\n" for n in range(99))
}
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


def printed_by(page: Path) -> Iterator[tuple[Block, str]]:
    """The Python blocks of a page, run in their order in the working folder, each with what it prints."""
    shutil.copy(ROOT / "LICENSE", ".")
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            source = block.text
            for large, small in SMALLER.items():
                source = source.replace(large, small)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"{page.name}:{block.line}", "exec"), names)
            yield block, printed.getvalue()
