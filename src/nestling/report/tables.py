"""Tables of rows: for a terminal, for Markdown and for a page, with numbers that can be compared at a glance."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from nestling.visible import visible

Row = Mapping[str, Any]
# What stands over columns whose names in results are no words; see `heading`.
WORDS = {
    "mean_sts": "STS, mean", "mean_ndcg": "nDCG@10, mean", "mean_recall": "recall@100, mean",
    "share_sts": "STS, of full", "share_ndcg": "nDCG@10, of full", "vector_bytes": "bytes a vector",
    "full_bytes": "full cache", "onnx_difference": "ONNX difference", "int8_cosine": "int8 cosine",
}  # fmt: skip
RETRIEVAL = {"ndcg_": "nDCG@10", "recall_": "recall@100"}  # in front of the names of sets
SHARES = ("share", "budget", "bytes_share", "word_share", "share_sts", "share_ndcg")  # are shown as percentages


@dataclass
class Grid:
    """A table as text: a header for each column, whether its cells are numbers, and the cells by line."""

    headers: list[str]
    numeric: list[bool]
    lines: list[list[str]]


class TerminalTable:
    """A table that fits the console it is printed on.

    Where it is too wide even with text on several lines, columns that are the same in every row go into the caption;
    if that is not enough, it is continued below, where the first column is repeated.
    """

    def __init__(self, grid: Grid, title: str | None):
        self.grid, self.title = grid, title
        self.columns = [[visible(cell) for cell in column] for column in zip(grid.headers, *grid.lines, strict=True)]
        self.wanted = [max(map(cell_len, column)) for column in self.columns]
        self.needed = [self._least(column, right) for column, right in zip(self.columns, grid.numeric, strict=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns, caption = list(range(len(self.columns))), ""
        if self._width(columns) > options.max_width and len(self.grid.lines) > 1:
            same = [i for i in columns[1:] if len(set(self.columns[i][1:])) == 1]
            columns = [i for i in columns if i not in same]
            caption = ", ".join(f"{self.columns[i][0]} {self.columns[i][1]}" for i in same)
        parts = self._split(columns, options.max_width)
        for part in parts:
            out = self._table(part, options.max_width)
            if part is parts[0] and self.title is not None:
                out.title, out.title_justify = Text(visible(self.title)), "left"
            if part is parts[-1] and caption:
                out.caption, out.caption_justify = Text(f"In every row: {caption}"), "left"
            yield out

    @staticmethod
    def _least(column: list[str], right: bool) -> int:
        """The fewest characters that a column can be read in: whole numbers, and whole words up to 24 characters."""
        texts = column[:1] if right else column
        words = [min(cell_len(word), 24) for text in texts for word in text.split()]
        return max([1, *words, *map(cell_len, column[1:] if right else ())])

    def _width(self, columns: list[int]) -> int:
        return 1 + sum(3 + self.needed[i] for i in columns)

    def _split(self, columns: list[int], width: int) -> list[list[int]]:
        parts = [columns[:1]]
        for column in columns[1:]:
            if len(parts[-1]) > 1 and self._width([*parts[-1], column]) > width:
                parts.append(columns[:1])
            parts[-1].append(column)
        return parts

    def _table(self, columns: list[int], max_width: int) -> Table:
        spare = max_width - self._width(columns)
        lacking = {i: self.wanted[i] - self.needed[i] for i in columns}
        share = min(1.0, max(0.0, spare / (sum(lacking.values()) or 1)))
        out = Table()
        for i in columns:
            width = self.needed[i] + int(share * lacking[i])
            header = Text(self.columns[i][0])
            out.add_column(header, justify="right" if self.grid.numeric[i] else "left", width=width)
        for line in zip(*(self.columns[i][1:] for i in columns), strict=True):
            out.add_row(*map(Text, line))
        return out


def table(rows: Sequence[Row], columns: Mapping[str, str] | None = None, title: str | None = None) -> TerminalTable:
    """A terminal table. `columns` maps row keys to headers; by default every key's `heading`, in order of appearance.

    Floats show 3-4 significant digits, shares are percentages, missing cells are "-"; no text is read as rich markup.
    """
    return TerminalTable(grid(rows, columns), title)


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """The same table in Markdown, for READMEs and model cards."""
    shown = grid(rows, columns)
    clean = [[_in_markdown(t) for t in line] for line in (shown.headers, *shown.lines)]
    clean.insert(1, ["---:" if right else "---" for right in shown.numeric])
    return "".join(f"| {' | '.join(line)} |\n" for line in clean)


def _in_markdown(text: str) -> str:
    """A cell's text that is only text: no tags, links, code or emphasis."""
    line = visible(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")


def grid(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> Grid:
    """The rows as text; `columns` as for `table`."""
    columns = {key: heading(key) for row in rows for key in row} if columns is None else columns
    values = {key: [scalar(row.get(key)) for row in rows] for key in columns}
    cells = [percentages(column) if key in SHARES else formatted(column) for key, column in values.items()]
    numeric = [all(value is None or _is_number(value) for value in column) for column in values.values()]
    return Grid(list(columns.values()), numeric, [list(line) for line in zip(*cells, strict=True)])


def heading(column: str) -> str:
    """What stands over a column of results: words for our own measures, and everything else as it is."""
    if share := re.fullmatch(r"kl_(0\.\d+|1(?:\.0)?)", column):
        return f"KL at {100 * float(share[1]):.4g}%"
    for prefix, measure in RETRIEVAL.items():
        if column.startswith(prefix):
            return f"{measure}, {column.removeprefix(prefix)}"
    name, when = column.partition(" ")[::2]
    return f"{WORDS.get(name, name)} {when}".rstrip()


def settings(options: Mapping[str, Any]) -> list[Row]:
    """Options as rows of a name and a value, the way they are read best; tables among them are left out."""
    return [{"setting": name, "value": _setting(value)} for name, value in options.items() if not is_table(value)]


def is_table(value: Any) -> bool:
    """Whether a value is rows."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(each)}" for name, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(each) for each in value if each not in ("", None)) or "-"
    return formatted([scalar(value)])[0] or "-"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def scalar(value: Any) -> Any:
    """The number in a tensor or array of one, and everything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def percentages(column: Sequence[Any]) -> list[str]:
    """A column of shares as text, with 3 significant digits; what is no number stays as it is."""
    return [f"{100 * value:.3g}%" if _is_number(value) else formatted([value])[0] for value in column]


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
