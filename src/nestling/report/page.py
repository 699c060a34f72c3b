"""Results as JSON, tables, figures and one self-contained HTML page.

Everything works on flat rows, one dict a measurement, whose values are strings, bools, numbers (also numpy and torch
scalars) or missing: absent, None or NaN.
"""

import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich.table import Table
from rich.text import Text

from nestling.errors import OptionError
from nestling.files.writing import write_file
from nestling.visible import visible, visible_lines

Row = Mapping[str, Any]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito, safe for colour-blind
MARKERS = "os^DvPX"  # no line is told by its colour alone
INK = "#333333"


def run_meta(seconds: float | None = None) -> dict[str, Any]:
    """What it takes to repeat a run that took `seconds`; no hostname, and no folder of an absolute path, is recorded.

    `commit` is None unless git tracks this file.
    """
    versions = {package: _version(package) for package in ("torch", "transformers", "nestling")}
    return {
        "commit": _commit(Path(__file__).resolve()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores{_gpu()}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "command": _command(sys.argv),
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _commit(file: Path) -> str | None:
    tracked, head = ("ls-files", "--error-unmatch", file.name), ("rev-parse", "--short", "HEAD")
    try:  # an installed copy may lie inside somebody else's checkout, hence the first question
        for question in (tracked, head):
            answer = subprocess.run(("git", *question), cwd=file.parent, capture_output=True, text=True, check=True)
        return answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*\S)", info.read_text() if info.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _command(argv: Sequence[str]) -> str:
    """The command line, each absolute path cut to its last part, also inside `--flag=/a/b` and `/a/b,/c/d`."""
    program = Path(argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    parts = [re.split("([=,:])", arg) for arg in argv[1:]]
    return shlex.join([name, *("".join(Path(p).name if os.path.isabs(p) else p for p in arg) for arg in parts)])


def write_json(path: str | os.PathLike[str], rows: Iterable[Row], meta: Mapping[str, Any]) -> None:
    """Write `{"rows": [...], "meta": {...}}`, one row a line, atomically; NaN and infinities become null.

    Raises FileError where it cannot be written and TypeError for a value that JSON cannot hold; an older file stays.
    """
    lines = ",\n".join(json.dumps(plain(row)) for row in rows)
    write_file(path, f'{{"rows": [\n{lines}\n],\n"meta": {json.dumps(plain(meta), indent=1)}}}\n')


def write_png(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure, whole or not at all; FileError where it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": "nestling"})
    write_file(path, buffer.getvalue())


def plain(value: Any) -> Any:
    """`value` in JSON's own types; arrays and tensors become numbers or lists, NaN and infinities None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def table(rows: Sequence[Row], columns: Mapping[str, str] | None = None, title: str | None = None) -> Table:
    """A terminal table. `columns` maps row keys to headers; by default every key, in order of appearance.

    Floats show 3-4 significant digits and missing cells "-"; no text is read as rich markup.
    """
    headers, numeric, lines = _grid(rows, columns)
    out = Table(title=None if title is None else Text(visible(title)), title_justify="left")
    for header, right in zip(headers, numeric, strict=True):
        out.add_column(Text(visible(header)), justify="right" if right else "left")
    for line in lines:
        out.add_row(*(Text(visible(cell)) for cell in line))
    return out


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """The same table in Markdown, for READMEs and model cards."""
    headers, numeric, lines = _grid(rows, columns)
    clean = [[_in_markdown(t) for t in line] for line in (headers, *lines)]
    clean.insert(1, ["---:" if right else "---" for right in numeric])
    return "".join(f"| {' | '.join(line)} |\n" for line in clean)


def _in_markdown(text: str) -> str:
    """A cell's text that is only text: no tags, links, code or emphasis."""
    line = visible(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")


def _in_html(text: str) -> str:
    return escape(visible(" ".join(text.split())))


def _html_table(rows: Sequence[Row], columns: Mapping[str, str] | None) -> str:
    headers, numeric, lines = _grid(rows, columns)
    starts = ["td class=n" if right else "td" for right in numeric]
    body = [
        [f"<{start}>{_in_html(t)}</td>" for start, t in zip(starts, line, strict=True)] for line in (headers, *lines)
    ]
    body[0] = [cell.replace("<td", "<th").replace("</td>", "</th>") for cell in body[0]]
    return "<div><table>\n" + "".join(f"<tr>{''.join(line)}</tr>\n" for line in body) + "</table></div>\n"


def _grid(rows: Sequence[Row], columns: Mapping[str, str] | None) -> tuple[list[str], list[bool], list[list[str]]]:
    """Headers, which columns are numeric, and the lines of formatted cells."""
    columns = {key: key for row in rows for key in row} if columns is None else columns
    values = [[_scalar(row.get(key)) for row in rows] for key in columns]
    numeric = [
        all(v is None or (isinstance(v, Real) and not isinstance(v, bool)) for v in column) for column in values
    ]
    return list(columns.values()), numeric, [list(line) for line in zip(*map(_format, values), strict=True)]


def _scalar(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _format(column: Sequence[Any]) -> list[str]:
    """A column as text; floats show 4 significant digits (3 below 0.1) and no more decimals than the column uses."""

    def decimals(value: float) -> int:
        exponent = int(f"{value:.3e}".split("e")[1]) if value else 3
        return max(0, (3 if exponent >= -1 else 2) - exponent)

    def text(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "-", True: "yes", False: "no"}[value]
        if isinstance(value, float):
            return f"{value:,.{min(used, decimals(value))}f}" if fixed(value) else f"{value:.2e}"
        return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)

    def fixed(value: Any) -> bool:
        return isinstance(value, float) and (value == 0 or 1e-4 <= abs(value) < math.inf)

    used = max((len(f"{v:.{decimals(v)}f}".rstrip("0").partition(".")[2]) for v in column if fixed(v)), default=0)
    return [text(value) for value in column]


def curve(
    rows: Sequence[Row],
    x: str,
    y: str,
    series: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    percent_x: bool = False,
) -> Figure:
    """`y` over `x`, one line for each value of `series`; a series of one row is a labelled marker.

    Rows without x or y are left out. Numbers on x are sorted, text ("6x128") keeps the order of the rows. On a
    logarithmic axis points at or below zero leave a gap. `percent_x`: 0.4 reads as 40%.
    """
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        if None not in (point := (_scalar(row.get(x)), _scalar(row.get(y)))):
            groups.setdefault(visible(str(row[series])), []).append(point)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(groups.items()):
        if not any(isinstance(px, str) for px, _ in points):
            points.sort()
        alone = len(points) == 1
        line = "none" if alone else "-"
        color = INK if alone else PALETTE[i % len(PALETTE)]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), label=_label(name), color=color, marker=marker, linestyle=line)
        if alone:
            note = axes.annotate(name, points[0], (7, 5), textcoords="offset points", color=INK, parse_math=False)
            note.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if percent_x:
        axes.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    _dress(axes, title, xlabel, ylabel)
    axes.margins(x=0.06, y=0.08)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if lines := [line for line in axes.lines if line.get_linestyle() != "None"]:
        for entry in figure.legend(handles=lines, loc="outside right upper", frameon=False).get_texts():
            entry.set_parse_math(False)
    return figure


def heat_maps(
    panels: Mapping[str, ArrayLike],
    *,
    title: str,
    row_label: str,
    col_label: str,
    vmax: float | None = None,
    unit: str = "",
    row_names: Sequence[str] | None = None,
    col_names: Sequence[str] | None = None,
) -> Figure:
    """Matrices [rows, cols] side by side on one colour scale from 0 to `vmax`, by default the largest value.

    Row 0 is on top, values are printed where they fit, missing cells are grey. Rows and columns are numbered from 0
    unless they have names. Raises ValueError when a panel is not a matrix, and for no panels.
    """
    arrays = [np.array(_scalar(panel), dtype=float) for panel in panels.values()]
    if not arrays or any(array.ndim != 2 or not array.size for array in arrays):
        raise OptionError("a heat map needs panels of [rows, cols], each with a cell")
    top = max(array[np.isfinite(array)].max(initial=0.0) for array in arrays) if vmax is None else vmax
    norm = Normalize(0.0, top or 1.0)
    height, width = np.max([array.shape for array in arrays], axis=0)
    printed = width <= 12 and height <= 48
    panel_width = max(1.6, 0.4 + (0.5 * width if printed else min(0.4 * width, 3.2)))
    size = (len(arrays) * panel_width + 1.3, 1.2 + max(1.2, 0.21 * height if printed else min(0.21 * height, 6)))
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(1, len(arrays), squeeze=False)[0])
    for axes, name, array in zip(grid, panels, arrays, strict=True):
        rows, cols = array.shape
        image = axes.pcolormesh(np.arange(cols + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(array))
        image.set(cmap="YlGnBu", norm=norm, edgecolor="white", linewidth=0.4)
        axes.set(ylim=(rows - 0.5, -0.5), facecolor="#d0d0d0")
        for axis, n, names in ((axes.yaxis, rows, row_names), (axes.xaxis, cols, col_names)):
            ticks = range(0, n, 2 ** max(0, math.ceil(math.log2(n / 16))))
            axis.set_ticks(ticks, labels=None if names is None else [names[tick] for tick in ticks])
        _dress(axes, name, col_label, row_label if axes is grid[0] else "")
        axes.spines[:].set_visible(False)
        for (row, col), v in np.ndenumerate(array) if printed else ():
            if np.isfinite(v):
                style = {"ha": "center", "va": "center", "size": 7.5, "color": "white" if norm(v) > 0.55 else INK}
                axes.text(col, row, f"{v:.0f}" if v == round(v) else f"{v:.2f}", **style)
    bar = figure.colorbar(image, ax=grid, fraction=0.05, pad=0.02)
    bar.set_label(unit, color=INK, parse_math=False)
    bar.ax.tick_params(colors=INK, labelsize=8.5)
    figure.suptitle(visible(title), x=0.02, ha="left", size=11, color=INK, parse_math=False)
    return figure


def _label(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    # "$" is a dollar sign here, never TeX.
    axes.set_title(visible(title), loc="left", size=11, color=INK, parse_math=False)
    axes.set_xlabel(xlabel, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, color=INK, parse_math=False)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)


@dataclass
class Section:
    """A part of the page, shown in this order; a blank line in `text` starts a paragraph, `pre` is monospace."""

    title: str
    text: str = ""
    rows: Sequence[Row] | None = None
    columns: Mapping[str, str] | None = None
    figure: Figure | None = None
    pre: str | None = None


def write_html(
    path: str | os.PathLike[str], title: str, intro: str, sections: Iterable[Section], meta: Mapping[str, Any]
) -> None:
    """Write one self-contained page, atomically: inline style and SVG, all text escaped, any load forbidden by policy.

    Raises FileError where it cannot be written; an older file stays.
    """
    body = f"<header><h1>{_in_html(title)}</h1>\n{_paragraphs(intro)}</header>\n"
    for i, section in enumerate(sections):
        body += f"<section><h2>{_in_html(section.title)}</h2>\n{_paragraphs(section.text)}"
        body += _html_table(section.rows, section.columns) if section.rows is not None else ""
        if section.figure is not None:
            svg = _svg(section.figure, f"fig{i}-")
            body += f'<figure role="img" aria-label="{_in_html(section.title)}">{svg}</figure>\n'
        body += f"<pre>\n{escape(visible_lines(section.pre))}</pre>\n" if section.pre is not None else ""
        body += "</section>\n"
    facts = "".join(f"<dt>{_in_html(str(key))}</dt><dd>{_in_html(_fact(value))}</dd>\n" for key, value in meta.items())
    write_file(path, _PAGE.format(title=_in_html(title), style=_STYLE, body=body, facts=facts))


def _paragraphs(text: str) -> str:
    return "".join(
        f"<p>{escape(visible_lines(part.strip()))}</p>\n" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _fact(value: Any) -> str:
    nested = isinstance(value, Mapping)
    return ", ".join(f"{k} {_fact(v)}" for k, v in value.items()) if nested else _format([_scalar(value)])[0]


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element whose ids all start with `prefix`, so that several fit on one page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :].strip())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="nestling"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>{style}</style></head>
<body>
{body}<footer><dl>
{facts}</dl></footer>
</body></html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #fff; --tint: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --paper: #0d1117; --tint: #161b22 } }
body { max-width: 54rem; margin: 0 auto; padding: 3rem 1.25rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .75rem }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .5rem }
p { max-width: 42rem; margin: .5rem 0 .75rem }
header p, footer, th { color: var(--soft) }
div, pre { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
:is(th, td):first-child { padding-left: 0 } .n { text-align: right }
figure { margin: 1rem 0; padding: 1rem; background: #fff; border: 1px solid var(--line); border-radius: 8px }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto }
pre { background: var(--tint); border-radius: 8px; padding: .9rem 1.1rem; font: .84rem/1.5 ui-monospace, monospace }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .84rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 }
dt { font-weight: 600 } dd { margin: 0 }
"""
