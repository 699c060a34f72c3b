"""Runs the Python snippets of pages and rewrites the outputs below them, after a change that is meant to alter these.

    python -m tests.docs.renew README.md docs/kv.md

Look at the differences before you commit them.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.docs.pages import printed_by


def renewed(page: Path) -> str:
    """The text of a page with the outputs of its snippets as they are now."""
    text = page.read_text("utf-8")
    for block, printed in printed_by(page):
        if block.output is not None:
            before, found, after = text.partition(block.text)
            lines = "".join(f"{line.rstrip()}\n" for line in printed.rstrip("\n").split("\n"))
            text = before + found + after.replace(block.output, lines, 1)
    return text


def main() -> None:
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in pages:
            page.write_text(renewed(page), "utf-8")


if __name__ == "__main__":
    main()
