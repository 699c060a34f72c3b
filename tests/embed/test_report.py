"""The wing's pages: what a training measured is a table of its own, and columns that say nothing are not shown."""

import re

from nestling.embed.report import write_evaluation, write_training

INFO = {
    "temperature": 0.05,
    "steps": 2442,
    "rows": 332945,
    "teacher": None,
    "bf16": True,
    "prompts": ["", ""],
    "left_out": {"texts that are measured on": 1740},
    "measured": [{"size": "1x8", "mean_sts": 0.5, "share_sts": 0.93}, {"size": "4x32", "mean_sts": 0.7}],
    "curve": [{"step": 10, "loss": 1.0, "1x8": 0.5, "4x32": 0.4}, {"step": 20, "loss": 0.5, "1x8": 0.25, "4x32": 0.2}],
}


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]


def test_settings_are_values_and_measurements_are_a_table(tmp_path):
    write_training(tmp_path / "page.html", INFO, title="minilm: training")
    page = (tmp_path / "page.html").read_text()
    rows = cells(page)
    settings = dict(row for row in rows if len(row) == 2)
    assert settings["temperature"] == "0.05" and settings["rows"] == "332,945" and settings["bf16"] == "yes"
    assert settings["teacher"] == settings["prompts"] == "-"
    assert settings["left_out"] == "texts that are measured on: 1740"
    assert ["1x8", "0.5", "93%"] in rows and ["4x32", "0.7", "-"] in rows
    assert "What the sizes are worth" in page and "{" not in "".join(sum(rows, []))


def test_columns_that_are_the_same_for_all_sizes_are_left_out(tmp_path):
    rows = [
        {"model": "m", "method": "", "size": s, "seed": 0, "mean_sts": q} for s, q in (("1x8", 0.5), ("4x32", 0.7))
    ]
    write_evaluation(tmp_path / "page.html", rows, title="m: quality of every size", grid=False)
    assert cells((tmp_path / "page.html").read_text()) == [["size", "STS, mean"], ["1x8", "0.5"], ["4x32", "0.7"]]
    both = [rows[0] | {"method": "cut"}, rows[1] | {"method": "aligned"}]
    write_evaluation(tmp_path / "page.html", both, title="m", grid=True)
    assert cells((tmp_path / "page.html").read_text())[0] == ["method", "size", "STS, mean"]
