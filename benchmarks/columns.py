"""Markdown tables of results: how numbers are written, and rows into columns."""

import json
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = Mapping[str, Any]
Format = Callable[[Any], str]


def load(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]


def digits(value: float) -> str:
    """Three significant digits, never in scientific notation. Whole numbers stay as they are."""
    return f"{value:,.0f}" if isinstance(value, int) or not value else f"{Decimal(f'{value:.2e}'):,f}"


def percent(share: float) -> str:
    return f"{digits(100 * share)} %"


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def budget_percent(share: float) -> str:
    return f"{100 * share:g} %"


def times_100(value: float) -> str:
    return digits(100 * value)


def of_four(share: float) -> str:
    return f"{4 * share:.0f} of 4"


def millions(count: float) -> str:
    return digits(count / 1e6)


def table(rows: Iterable[Row], columns: Mapping[str, tuple[str, Format]]) -> str:
    """Markdown. Every row must have a value in every column: split a table that would have empty cells."""
    texts = [[form(row[key]) for key, (_, form) in columns.items()] for row in rows]
    first, *others = [title for title, _ in columns.values()]
    rules = [["---", *["---:"] * len(others)]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [[first, *others], *rules, *texts])


def titled(tables: Mapping[str, str]) -> str:
    return "\n".join(f"{title}:\n\n{body}" for title, body in tables.items())


def unique(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def pivot(rows: Iterable[Row], down: tuple[str, str, Format], across: tuple[str, Format], value: str, form: Format):
    """A row for each value of one key, a column for each value of another."""
    key, title, label = down
    rows = list(rows)
    lines: dict[Any, dict] = {}
    for row in rows:
        lines.setdefault(row[key], {key: row[key]})[row[across[0]]] = row[value]
    columns = {column: (across[1](column), form) for column in unique(rows, across[0])}
    return table(lines.values(), {key: (title, label), **columns})
