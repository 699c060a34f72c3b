"""Every Python snippet of the README and of docs runs, in the order of its page, and prints what the page shows."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, pages

# Hours and large files become seconds here: text on a page -> what the test runs in its place.
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
    shutil.copy(ROOT / "LICENSE", tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    names: dict = {"__name__": "__main__"}
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
            assert words(printed.getvalue()) == words(block.output), f"{page.name}:{block.line}"
            assert numbers(printed.getvalue()) == pytest.approx(numbers(block.output), rel=TOLERANCE), block.line
