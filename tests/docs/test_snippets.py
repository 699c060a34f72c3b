"""Every Python snippet of the README and of docs runs, in the order of its page, and prints what the page shows."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, pages, printed_by

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
TOLERANCE = 0.02  # of a number that is shown; other processors round differently


def with_snippets() -> list:
    """Pages with Python on them."""
    return [page for page in pages() if any(block.language == "python" for block in blocks(page))]


def words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("page", with_snippets(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_print_what_it_shows(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, printed in printed_by(page):
        if block.output is not None:
            assert words(printed) == words(block.output), f"{page.name}:{block.line}"
            assert numbers(printed) == pytest.approx(numbers(block.output), rel=TOLERANCE), block.line
