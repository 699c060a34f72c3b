import json
import math
import re
import stat
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nestling.errors import FileError
from nestling.report.figures import Scale, curve, heat_maps
from nestling.report.page import Section, write_html
from nestling.report.results import _command, _commit, run_meta, write_json
from nestling.report.tables import formatted, grid, markdown_table, scalar, table

HOSTILE = "$\\frac{$ --></pre><script src=http://x>1</script>\"' [b] |"
ROWS = [
    {"method": "pca", "budget": 0.5, "kl": 0.25, "bytes": 123456},
    {"method": "pca", "budget": 0.25, "kl": 0.5, "bytes": 61728},
    {"method": "balanced", "budget": 0.25, "kl": 0.03125, "bytes": 61728},
    {"method": "balanced", "budget": 0.5, "kl": 0.0, "bytes": 123456},
    {"method": "int4", "budget": 0.375, "kl": 0.125},
    {"method": "lost", "budget": 0.375, "kl": math.nan},
]


def plot(rows=ROWS, words=("KL", "share", "nats"), **options):
    title, x, y = words
    return curve(rows, Scale("budget", x, percent=True), Scale("kl", y, **options), "method", title)


# run_meta


def test_meta_names_the_run_and_nothing_private(monkeypatch, tmp_path):
    argv = [
        str(tmp_path / "bin/nestling"),
        "kv",
        "eval",
        str(tmp_path / "m dir"),
        f"--json={tmp_path}/out.json",
        "0.4",
    ]
    monkeypatch.setattr("sys.argv", argv)
    meta = run_meta(1.26)
    assert list(meta) == ["commit", "date", "machine", "threads", "versions", "command", "seconds"]
    assert meta["command"] == "nestling kv eval 'm dir' --json=out.json 0.4"
    assert meta["seconds"] == 1.3 and run_meta()["seconds"] is None
    assert meta["threads"] == torch.get_num_threads()
    assert set(meta["versions"]) == {"python", "torch", "transformers", "nestling"}
    assert meta["commit"] is None or re.fullmatch("[0-9a-f]{7,}", meta["commit"])
    assert str(tmp_path.parent) not in json.dumps(meta)


def test_command_of_python_dash_m_and_of_lists():
    assert _command(["/a/b/nestling/__main__.py", "/c/d,/e/f/"]) == "nestling d,f"


def test_commit_is_none_outside_git(tmp_path):
    assert _commit(tmp_path / "report.py") is None


# write_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(), scalars | st.lists(scalars))), st.dictionaries(st.text(), scalars))
def test_json_round_trip(tmp_path_factory, rows, meta):
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, rows, meta)
    assert json.loads(path.read_text()) == {"rows": rows, "meta": meta}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32("nan"), None),
        (torch.tensor(math.inf), None),
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        ({"a": (np.float64("inf"), 1)}, {"a": [None, 1]}),
    ],
)
def test_json_values(tmp_path, value, written):
    write_json(tmp_path / "x.json", [{"v": value}], {"v": value})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [{"v": written}], "meta": {"v": written}}


def test_json_is_one_row_a_line(tmp_path):
    write_json(tmp_path / "x.json", ROWS, {})
    assert sum(line.startswith('{"method"') for line in (tmp_path / "x.json").read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize("failure", ["os.replace", "pathlib.Path.write_text"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "x.json"
    write_json(path, [], {"old": True})

    def fail(target, *args, **kwargs):
        if failure.endswith("write_text"):
            target.write_bytes(b'{"half')
        raise OSError("disk full")

    monkeypatch.setattr(failure, fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, [], {"old": False})
    assert json.loads(path.read_bytes())["meta"] == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_values_and_folders_are_named(tmp_path):
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "x.json", [{"v": object()}], {})
    with pytest.raises(FileError, match=r"cannot write x\.json: the folder .*nowhere does not exist"):
        write_json(tmp_path / "nowhere" / "x.json", [], {})
    assert not list(tmp_path.iterdir())


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "x.json", [], {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.json")}
    assert len(modes) == 1


# tables


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ([0.5, 0.25, 1.0], ["0.50", "0.25", "1.00"]),
        ([12.3456, 1.23456, 123.456, 1234.56], ["12.35", "1.235", "123.5", "1,235"]),
        ([0.98765, 0.031234, 0.0031234], ["0.9877", "0.0312", "0.00312"]),
        ([0.00001234, -0.5, 0.0], ["1.23e-05", "-0.5", "0"]),
        ([0.9, 0.9012], ["0.9000", "0.9012"]),
        ([999.96, 9.9999999], ["1,000", "10"]),
        ([None, math.nan, math.inf, True, False], ["-", "-", "inf", "yes", "no"]),
        ([7, 9999, 10000, "a"], ["7", "9999", "10,000", "a"]),
        ([np.float32(0.5), torch.tensor(0.25), np.int64(2)], ["0.50", "0.25", "2"]),
    ],
)
def test_number_formatting(column, texts):
    assert [line[0] for line in grid([{"v": v} for v in column]).lines] == texts


@settings(deadline=None)
@given(st.lists(st.floats() | st.integers() | st.none() | st.booleans(), min_size=1))
def test_formatting_keeps_three_digits(column):
    for value, text in zip(column, formatted([scalar(v) for v in column]), strict=True):
        if isinstance(value, float) and math.isfinite(value):
            assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051)


def test_terminal_table_takes_text_literally():
    out = table([{"a": HOSTILE, "b": 1.5}, {"a": "x"}], {"a": "[red]A", "b": "B"}, title="[blue]t")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(out)
    text = capture.get()
    assert HOSTILE in text and "[red]A" in text and "[blue]t" in text
    lines = text.splitlines()
    assert lines[4].split("│")[2] == " 1.5 " and lines[5].split("│")[2] == "   - "


def shown_at(width, rows, **options):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(rows, **options))
    return capture.get()


def test_a_table_that_is_too_wide_drops_what_is_the_same_in_every_row():
    same = {f"an option {i}": 64 + i for i in range(9)}
    rows = [{"method": "a", **same, "kl": 0.125, "none": None}, {"method": "b", **same, "kl": 0.5, "none": None}]
    wide = shown_at(200, rows, title="a title")
    assert "In every row" not in wide and wide.splitlines()[2].count("│") == 0 and "an option 8" in wide
    narrow = shown_at(80, rows, title="a title")
    assert max(map(len, narrow.splitlines())) <= 80
    caption = " ".join(narrow.partition("In every row: ")[2].split())
    assert caption == ", ".join(f"{name} {value}" for name, value in same.items()) + ", none -"
    assert re.findall(r"[\d.]+", narrow.partition("In every row")[0]) == ["0.125", "0.500"]


def test_a_table_that_is_still_too_wide_is_continued_below():
    rows = [{"size": f"{i}x128"} | {f"number{j}": i * 1000.5 + j for j in range(14)} for i in range(3)]
    narrow = shown_at(80, rows)
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("2x128") == narrow.count("size") >= 2
    cells = [grid(rows).lines[i][j] for i in range(3) for j in range(1, 15)]
    assert all(re.search(rf"(?<![\d.,]){re.escape(cell)}(?![\d.,])", narrow) for cell in cells)
    assert max(map(len, shown_at(80, rows[:1]).splitlines())) <= 80


def test_long_text_in_a_table_is_broken_between_words():
    rows = [{"query": "a question of several words", "answer": "word " * 30, "score": 0.123}]
    lines = shown_at(80, rows).splitlines()
    assert max(map(len, lines)) <= 80 and sum("query" in line for line in lines) == 1
    assert " ".join(lines).count("word ") >= 30 and "0.123" in " ".join(lines)


def test_shares_are_percentages():
    rows = [{"budget": 0.25, "bytes_share": 0.4031, "share": 1.0, "kl": 0.25}, {"budget": None, "bytes_share": 0.0625}]
    assert grid(rows).lines == [["25%", "40.3%", "100%", "0.25"], ["-", "6.25%", "-", "-"]]
    assert grid(rows).numeric == [True] * 4


def test_markdown_table():
    rows = [{"m": "a|b\nc", "x": 0.5}, {"m": "<b>", "x": None}]
    expected = "| M | X |\n| --- | ---: |\n| a\\|b c | 0.5 |\n| &lt;b> | - |\n"
    assert markdown_table(rows, {"m": "M", "x": "X"}) == expected
    assert markdown_table(rows[:1]).startswith("| m | x |\n")
    assert markdown_table([], {"m": "M"}) == "| M |\n| ---: |\n"


def test_headings_are_words_for_our_measures_and_sets_keep_their_names():
    row = {"size": "2x8", "my_set": 0.5, "ndcg_my_set": 0.5, "mean_sts before": 0.5, "kl_0.375": 0.1, "kl_99": 1.0}
    words = ["size", "my_set", "nDCG@10, my_set", "STS, mean before", "KL at 37.5%", "kl_99"]
    assert grid([row]).headers == words and grid([row], {"my_set": "mean_sts"}).headers == ["mean_sts"]


# figures


def test_curve_has_one_sorted_line_per_series_and_labels_single_points():
    figure = plot()
    axes = figure.axes[0]
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "pca": [[0.25, 0.5], [0.5, 0.25]],
        "balanced": [[0.25, 0.03125], [0.5, 0.0]],
        "int4": [[0.375, 0.125]],
    }
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "None"]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 3
    assert [note.get_text() for note in axes.texts] == ["int4"]
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["pca", "balanced"]
    figure.canvas.draw()
    assert all(tick.get_text().endswith("%") for tick in axes.get_xticklabels())


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_curve_log_axis_has_readable_ticks(scale):
    figure = plot([row | {"kl": row["kl"] * scale + 0.02} for row in ROWS], log=True)
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


def test_curve_keeps_the_order_of_text_and_survives_no_data():
    rows = [{"budget": cup, "kl": i, "method": "srl"} for i, cup in enumerate(("2x32", "4x64", "12x768"))]
    assert plot(rows).axes[0].lines[0].get_xdata().tolist() == ["2x32", "4x64", "12x768"]
    assert not plot([], log=True).axes[0].lines


def meshes(figure):
    return [axes.collections[0] for axes in figure.axes[:-1]]  # the last axes are the colour bar


def test_heat_maps_share_one_scale():
    keys, values = torch.arange(90).reshape(30, 3).bfloat16(), [[1, 2, None], [4, 5, 200]]
    figure = heat_maps({"keys": keys, "values": values}, title="ranks", row_label="layer", col_label="head", unit="r")
    assert [mesh.get_clim() for mesh in meshes(figure)] == [(0, 200), (0, 200)]
    assert [mesh.get_array().shape for mesh in meshes(figure)] == [(30, 3), (2, 3)]
    assert [text.get_text() for text in figure.axes[1].texts] == ["1", "2", "4", "5", "200"]
    for axes in figure.axes[:-1]:
        assert axes.yaxis_inverted() and all(float(tick).is_integer() for tick in axes.get_yticks())
    assert figure.axes[-1].get_ylabel() == "r"


def test_large_heat_maps_print_no_values_and_vmax_is_kept():
    labels = {"title": "ranks", "row_label": "layer", "col_label": "head"}
    figure = heat_maps({"keys": np.zeros((32, 32))}, vmax=128, **labels)
    assert not figure.axes[0].texts and meshes(figure)[0].get_clim() == (0, 128)
    heat_maps({"keys": np.zeros((1, 1))}, **labels).canvas.draw()


@pytest.mark.parametrize("panels", [{}, {"keys": [1, 2]}, {"keys": [[]]}])
def test_heat_maps_refuse_what_is_no_matrix(panels):
    with pytest.raises(ValueError, match="panels"):
        heat_maps(panels, title="", row_label="", col_label="")


# page


class Page(HTMLParser):
    VOID = {"meta", "path", "use", "rect", "image"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.note(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.note(attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def note(self, attrs):
        for name, value in attrs:
            assert not name.startswith("on")
            self.ids += [value] if name == "id" else []
            self.references += [value] if name in ("src", "href", "xlink:href") else re.findall(r"url\((.*?)\)", value)


@pytest.fixture
def page(tmp_path):
    hostile = [{"method": HOSTILE, "budget": b, "kl": 1.0} for b in (1, 2)] + [
        {"method": HOSTILE + "1", "budget": 1, "kl": 2.0}
    ]
    maps = heat_maps({HOSTILE: [[1, 2]]}, title=HOSTILE, row_label=HOSTILE, col_label=HOSTILE, unit=HOSTILE)
    lines = plot(hostile, [HOSTILE] * 3)
    sections = [
        Section(HOSTILE, HOSTILE, rows=hostile, columns={"method": HOSTILE, "kl": "KL"}, figure=lines, pre=HOSTILE),
        Section("second", "one\n\ntwo", figure=maps),
        Section("third", figure=plot()),
    ]
    path = tmp_path / "x.html"
    write_html(path, HOSTILE, HOSTILE, sections, {"commit": None, HOSTILE: HOSTILE, "versions": {"a": "1", "b": None}})
    return path.read_text(encoding="utf-8")


def test_page_escapes_everything_and_loads_nothing(page):
    parsed = Page(page)
    assert not parsed.open
    assert not {"script", "img", "link", "iframe", "b"} & set(parsed.tags)
    assert "<script" not in page and "@import" not in page and "default-src 'none'" in page
    assert parsed.references and all(ref.startswith(("#", "data:image/png")) for ref in parsed.references)
    assert parsed.text.count(HOSTILE) >= 6  # h1, intro, h2, text, cells, pre


def test_page_figures_share_no_id(page):
    parsed = Page(page)
    assert parsed.tags.count("svg") == 3
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {ref[1:] for ref in parsed.references if ref.startswith("#")}
    assert targets and targets <= set(parsed.ids)


def test_page_content(page):
    assert "<p>one</p>\n<p>two</p>" in page
    assert '<th class="n">KL</th>' in page and '<td class="n">2</td>' in page
    assert "<dd>a 1</dd>" in page and "commit" not in page  # what is None is left out
    assert "prefers-color-scheme: dark" in page


def test_page_survives_undecodable_text(tmp_path):
    write_html(tmp_path / "x.html", "t", "\udcff {brace}", [], {})
    assert "\\udcff {brace}" in (tmp_path / "x.html").read_text()


def test_page_is_reproducible(tmp_path):
    for name in "ab":
        write_html(tmp_path / name, "t", "", [Section("s", figure=plot())], {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
