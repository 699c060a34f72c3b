"""The pages of results: they show the committed files, without an empty cell, in words that the index explains."""

import importlib
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
sys.path.insert(0, str(BENCHMARKS))
tables, names = (importlib.import_module(name) for name in ("tables", "names"))
sys.path.pop(0)


def cells(markdown: str) -> list[list[str]]:
    return [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]


def test_pages_show_the_committed_results():
    tables.main(check=True)
    assert len(tables.PAGES) == 13


def test_a_changed_number_is_told(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(tables.PAGES[-1].parent.joinpath("encoder-cost.md").read_text("utf-8").replace("18.4", "18.3"))
    monkeypatch.setattr(tables, "PAGES", (page,))
    with pytest.raises(SystemExit, match="page.md is out of date"):
        tables.main(check=True)
    tables.main(check=False)
    tables.main(check=True)


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_have_no_empty_cells_and_are_shown(name):
    rows = cells(tables.TABLES[name]())
    assert rows and all(cell.strip() not in ("", "-") for row in rows for cell in row)
    pages = "".join(page.read_text("utf-8") for page in tables.PAGES)
    assert f"<!-- {name} -->" in pages or name in ("kv_short", "embed_short")


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (1.0, "1.00"), (2.3e-05, "0.0000230"), (0.05765, "0.0576"), (1974.4, "1,970"), (30522, "30,522")],
)
def test_three_digits(value, text):
    assert tables.digits(value) == text


def test_short_tables_agree_with_the_files():
    rows = {(r["model"], r["method"], r["budget"]): r for r in tables.load("kv_cost") if r["context"] == 2048}
    short = [[cell.strip() for cell in row] for row in cells(tables.TABLES["kv_short"]())[2:]]
    ours = rows["smollm2", "bits", 0.25]
    assert len(short) == 6 and short[4] == ["nestling", "25 %", f"{ours['kl']:.3g}", f"{100 * ours['top1']:.1f} %"]
    quality = {(r["model"], r["method"], r["size"]): 100 * r["mean_sts"] for r in tables.load("embed_quality")}
    size, cut, aligned, trained, separate, speed = (cell.strip() for cell in cells(tables.embed_short())[-1])
    assert size == "12x768" and speed == "1.00"
    expected = [quality["mpnet", method, size] for method in ("cut", "cut-aligned", "srl", "full-then-cut")]
    assert [cut, aligned, trained, separate] == [f"{value:.1f}" for value in expected]


def test_links_lead_to_files():
    for page in (*DOCS.rglob("*.md"), BENCHMARKS.parent / "README.md"):
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_names_every_encoder_method():
    index = (DOCS / "results" / "index.md").read_text("utf-8")
    known = {name for group in (names.ENCODERS, names.PRETRAININGS) for name in group.values()}
    plain = known - {"fine-tuning at full size", "every loss written out", "nestling"}
    assert not [name for name in plain if name not in index]
