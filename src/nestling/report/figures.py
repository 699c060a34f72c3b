"""Curves and heat maps, with colours that everybody can tell apart."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from nestling.errors import OptionError
from nestling.files.writing import write_file
from nestling.report.tables import Row, scalar
from nestling.visible import visible

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito, safe for colour-blind
MARKERS = "os^DvPX"  # no line is told by its colour alone
INK = "#333333"


def write_png(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure, whole or not at all; FileError where it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": "nestling"})
    write_file(path, buffer.getvalue())


@dataclass(frozen=True)
class Scale:
    """What an axis shows: a column of the rows, and the words beside it.

    Attributes:
        log: the axis is logarithmic; points at or below zero leave a gap.
        percent: 0.4 reads as 40%.
    """

    column: str
    label: str
    log: bool = False
    percent: bool = False


def curve(rows: Sequence[Row], x: Scale, y: Scale, series: str, title: str) -> Figure:
    """`y` over `x`, one line for each value of the column `series`; a series of one row is a labelled marker.

    Rows without x or y are left out. Numbers on x are sorted, text ("6x128") keeps the order of the rows.
    """
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        if None not in (point := (scalar(row.get(x.column)), scalar(row.get(y.column)))):
            groups.setdefault(visible(str(row[series])), []).append(point)
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
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
    for scale, set_scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if scale.log:
            set_scale("log", nonpositive="mask")
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        if scale.percent:
            axis.set_major_formatter(ticker.PercentFormatter(1))
    _dress(axes, title, x.label, y.label)
    axes.margins(x=0.06, y=0.08)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if lines := [line for line in axes.lines if line.get_linestyle() != "None"]:
        for entry in figure.legend(handles=lines, loc="outside lower left", ncols=3, frameon=False).get_texts():
            entry.set_parse_math(False)
    return figure


def bars(values: Mapping[str, float], *, title: str, label: str) -> Figure:
    """One bar a name, from the left, with its value at the end."""
    figure = Figure(figsize=(6.2, 0.9 + 0.4 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.barh([visible(name) for name in values], list(values.values()), color=PALETTE[0], height=0.6)
    axes.bar_label(shown, fmt="{:.3g}", padding=4, color=INK, size=9.5)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    _dress(axes, title, label, "")
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
    arrays = [np.array(scalar(panel), dtype=float) for panel in panels.values()]
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
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
