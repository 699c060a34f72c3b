"""Tables of rows: for a terminal, for Markdown and for a page, with numbers that can be compared at a glance."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real
from typing import Any

from rich.table import Table
from rich.text import Text

from nestling.visible import visible

Row = Mapping[str, Any]


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


def in_html(text: str) -> str:
    """Text that is not ours, as HTML."""
    return escape(visible(" ".join(text.split())))


def html_table(rows: Sequence[Row], columns: Mapping[str, str] | None) -> str:
    """Rows as an HTML table."""
    headers, numeric, lines = _grid(rows, columns)
    starts = ["td class=n" if right else "td" for right in numeric]
    body = [
        [f"<{start}>{in_html(t)}</td>" for start, t in zip(starts, line, strict=True)] for line in (headers, *lines)
    ]
    body[0] = [cell.replace("<td", "<th").replace("</td>", "</th>") for cell in body[0]]
    return "<div><table>\n" + "".join(f"<tr>{''.join(line)}</tr>\n" for line in body) + "</table></div>\n"


def _grid(rows: Sequence[Row], columns: Mapping[str, str] | None) -> tuple[list[str], list[bool], list[list[str]]]:
    """Headers, which columns are numeric, and the lines of formatted cells."""
    columns = {key: key for row in rows for key in row} if columns is None else columns
    values = [[scalar(row.get(key)) for row in rows] for key in columns]
    numeric = [
        all(v is None or (isinstance(v, Real) and not isinstance(v, bool)) for v in column) for column in values
    ]
    return list(columns.values()), numeric, [list(line) for line in zip(*map(formatted, values), strict=True)]


def scalar(value: Any) -> Any:
    """The number in a tensor or array of one, and everything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def formatted(column: Sequence[Any]) -> list[str]:
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
