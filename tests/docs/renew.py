"""Runs the Python snippets of pages and writes what they print under them, after numbers have changed for a reason.

    python -m tests.docs.renew README.md docs/kv.md

Look at the differences before they are committed.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.docs.test_snippets import FILES, SMALLER


def renewed(page: Path) -> str:
    """The text of a page with the outputs of its snippets as they are now."""
    text, names = page.read_text("utf-8"), {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        source = block.text
        for large, small in SMALLER.items():
            source = source.replace(large, small)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"{page.name}:{block.line}", "exec"), names)
        if block.output is not None:
            place = text.index(block.text) + len(block.text)
            lines = "\n".join(line.rstrip() for line in printed.getvalue().rstrip("\n").split("\n")) + "\n"
            text = text[:place] + text[place:].replace(block.output, lines, 1)
    return text


def main() -> None:
    found = {page: page.resolve() for page in map(Path, sys.argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(ROOT / "LICENSE", folder)
        for name, text in FILES.items():
            Path(name).write_text(text, "utf-8")
        for name, page in found.items():
            page.write_text(renewed(page), "utf-8")
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
