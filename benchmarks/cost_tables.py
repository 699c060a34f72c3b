"""The tables of what a smaller cache costs, from kv_cost.json."""

import math
from collections.abc import Iterable
from itertools import pairwise

from columns import budget_percent, digits, load, percent, pivot, table, whole_percent
from names import CACHES, LEVELS

LENGTH = 2048  # tokens of the main tables
LONGEST = 4096
CACHE = {"method": ("cache", CACHES.__getitem__)}


def rows_of(model: str, methods: Iterable[str] | None = None, context: int = LENGTH) -> list[dict]:
    rows = [row for row in load("kv_cost") if row["model"] == model and row["context"] == context]
    return [row for row in rows if methods is None or row["method"] in methods]


def short() -> str:
    """Six rows for the README."""
    rows = {(row["method"], row["budget"]): row for row in rows_of("smollm2")}
    shown = [("full", None), ("int8", None), ("kivi-int4", None), ("kivi-int2", None), ("bits", 0.25), ("bits", 0.125)]
    columns = {"bytes_share": ("share of bf16", whole_percent), "kl": ("KL", digits)}
    columns |= {"top1": ("top-1 agreement", percent)}
    return table([rows[key] for key in shown], {**CACHE, **columns})


def budgets(model: str) -> str:
    """A row a budget: the mean with its interval, the tail, the first and last eighth, and choices of words."""
    rows = rows_of(model, ("full", "bits"))
    for row in rows:
        row["interval"] = f"{digits(row['kl_low'])} to {digits(row['kl_high'])}" if row["kl"] else "0"
    columns = {"bytes_share": ("share of bf16", percent), "kl": ("KL", digits), "interval": ("95 %", str)}
    columns |= {"kl_median": ("median", digits), "kl_99": ("99 %", digits), "kl_99_9": ("99.9 %", digits)}
    columns |= {"top1": ("top-1 agreement", percent), "next_token": ("next token right", percent)}
    return table(rows, {**CACHE, **columns})


def fitted() -> str:
    """An adapter that was not trained."""
    columns = {"budget": ("budget", budget_percent), "bytes_share": ("share of bf16", percent), "kl": ("KL", digits)}
    columns |= {"kl_99": ("99 %", digits), "top1": ("top-1 agreement", percent)}
    return table(load("kv_cost_fit"), columns)


def lengths() -> str:
    """KL by budget and length of the text, at the budgets that were measured at every length."""
    rows = [row for row in load("kv_cost") if row["model"] == "smollm2" and row["method"] == "bits"]
    contexts = {row["context"] for row in rows}
    shared = set.intersection(*({row["budget"] for row in rows if row["context"] == n} for n in contexts))
    rows = [row for row in rows if row["budget"] in shared]
    rows.sort(key=lambda row: (-row["budget"], row["context"]))
    down = ("budget", "budget", budget_percent)
    return pivot(rows, down, ("context", lambda n: f"{n:,} tokens"), "kl", digits)


def course() -> str:
    """KL in each eighth of the longest texts."""
    step = LONGEST // 8
    rows = []
    for row in rows_of("smollm2", context=LONGEST):
        if row["method"] in ("full", "control"):
            continue
        parts = {f"from {step * place:,}": value for place, value in enumerate(row["kl_by_position"])}
        rows.append({**row, **parts, "ratio": row["kl_last"] / row["kl_first"]})
    columns = {name: (name, digits) for name in rows[0] if name.startswith("from ")}
    return table(
        rows, {**CACHE, "bytes_share": ("share of bf16", percent), **columns, "ratio": ("last / first", digits)}
    )


def rivals(model: str) -> str:
    """Other caches beside ours at the same bytes and with the same exact tokens, between the budgets measured."""
    ours = sorted((row["bytes_share"], row["kl"]) for row in rows_of(model, ("bits-window-64",)))
    others = [row for row in rows_of(model) if row["method"] not in ("full", "control", "bits", "bits-window-64")]
    others.sort(key=lambda row: -row["bytes_share"])
    rows = [row | {"ours": between(ours, row["bytes_share"])} for row in others]
    rows = [row | {"ratio": row["ours"] / row["kl"]} for row in rows]
    columns = {"bytes_share": ("share of bf16", percent), "kl": ("KL", digits), "kl_99": ("99 %", digits)}
    columns |= {"top1": ("top-1 agreement", percent), "ours": ("nestling's KL at these bytes", digits)}
    return table(rows, {**CACHE, **columns, "ratio": ("nestling's share of the KL", digits)})


def levels() -> str:
    """Other ways to quantise at equal allocations, by the share of the bits that coordinates have."""
    down = ("way", "codes", LEVELS.__getitem__)
    return pivot(load("kv_levels"), down, ("share", budget_percent), "kl", digits)


def between(points: list[tuple[float, float]], share: float) -> float:
    """KL at a share of the bytes, from points in order: straight between logarithms, flat beyond the ends."""
    share = min(max(share, points[0][0]), points[-1][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if share <= x1:
            part = (share - x0) / (x1 - x0)
            return math.exp((1 - part) * math.log(y0) + part * math.log(y1))
    return points[-1][1]
