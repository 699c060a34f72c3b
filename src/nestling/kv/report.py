"""What `nestling.kv` shows: bits of layers and heads, and HTML pages of measurements and trainings."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.table import Allocation, block_sizes
from nestling.report.figures import Scale, curve, heat_maps
from nestling.report.page import Section, write_html
from nestling.report.results import run_meta
from nestling.report.tables import settings

COLUMNS = {
    "method": "method", "budget": "budget", "bytes_share": "of bf16", "kl": "KL", "kl_99": "KL 99%",
    "kl_last": "KL, end", "ppl": "PPL", "top1": "top-1",
}  # fmt: skip
DETAILS = {"model", "bytes_per_token", "kl_low", "kl_high", "kl_median", "kl_99_9", "kl_first", "kl_by_position"}
DETAILS |= {"next_token"}  # are in the JSON alone
QUALITY = (
    "KL (nats per token) is the distance of the predictions to those of the full cache, on text that was not "
    "calibrated on; the history is read compressed, as in decoding. Top-1 is how often the first choice is the full "
    "model's. One token in a hundred has a KL above that of 99%, the end is the last eighth of the text, and PPL is "
    "perplexity. Bytes are those of the storage really held, beside a full cache in bf16; a model that computes in "
    "fp32 holds twice that by itself."
)

KL = Scale("kl", "KL to the full model (nats per token)", log=True)


def bit_rows(adapter: KVAdapter, allocation: Allocation) -> list[dict]:
    """One row a compressed layer: its index, the bits per number of each head, and the groups it is stored in."""
    keys, values = (side.tolist() for side in _bits_per_number(allocation))
    return [
        {"layer": layer, "keys": keys[row], "values": values[row], "groups": len(allocation.groups(row))}
        for row, layer in enumerate(adapter.fingerprint["layers"])
    ]


def bits_table(rows: Sequence[dict], title: str) -> Table:
    """Those rows for the terminal, the darker the more bits."""
    table = Table("layer", "keys", "values", "groups", title=title)
    for row in rows:
        cells = [
            Text.assemble(*((f" {bits:4.1f} ", f"on {_shade(bits / 16)}") for bits in row[side]))
            for side in ("keys", "values")
        ]
        table.add_row(str(row["layer"]), *cells, str(row["groups"]))
    return table


def bits_map(allocation: Allocation, title: str):
    """Heat maps of the bits per number of keys and of values, layers downwards (a matplotlib Figure)."""
    panels = dict(zip(("keys", "values"), _bits_per_number(allocation), strict=True))
    return heat_maps(panels, title=title, row_label="layer", col_label="KV head", unit="bits per number")


def _bits_per_number(allocation: Allocation) -> list[Tensor]:
    """Of keys and of values, ``[L, Hkv]``."""
    sizes = block_sizes(allocation.width)
    return [(side * sizes).sum(-1) / allocation.width for side in (allocation.keys, allocation.values)]


def _shade(share: float) -> str:
    """A background colour for the terminal, darker green for a larger share."""
    return f"rgb({int(40 * (1 - share))},{int(40 + 90 * share)},{int(60 * (1 - share))})"


def quality_section(rows: Sequence[dict]) -> Section:
    """The table of methods and budgets, and KL against bytes."""
    measured = [row for row in rows if row["method"] != "full"]
    share = Scale("bytes_share", "bytes held, share of the full bf16 cache", percent=True)
    figure = curve(measured, share, KL, "method", "What a smaller cache costs")
    return Section("Quality against bytes", QUALITY, rows=rows, columns=shown_columns(rows), figure=figure)


def shown_columns(rows: Sequence[dict]) -> dict[str, str]:
    """The columns that people compare, with their headers, and those of tasks and passkeys where there are some."""
    present = dict.fromkeys(key for row in rows for key in row)
    columns = {key: header for key, header in COLUMNS.items() if key in present}
    return columns | {key: key for key in present if key not in columns and key not in DETAILS}


def position_section(rows: Sequence[dict]) -> Section:
    """KL by position: whether a cache holds to the end of a text."""
    points = [
        {
            "eighth": place,
            "kl": value,
            "budget": row["method"] if row["budget"] is None else f"{100 * row['budget']:g}%",
        }
        for row in rows
        if row["method"] != "full"
        for place, value in enumerate(row.get("kl_by_position", ()), 1)
    ]
    figure = curve(points, Scale("eighth", "eighth of the text"), KL, "budget", "Does it last?")
    note = "The mean KL in each eighth of the texts. A line that rises says that longer texts will cost more."
    return Section("Loss by position", note, figure=figure)


def map_section(allocation: Allocation, name: str) -> Section:
    """Where the bits of one allocation are."""
    note = (
        "Bits per number, of the 16 of a full cache, by layer and KV head. Where more are kept, dropping them would "
        "cost more KL."
    )
    return Section(f"Where the bits are at {name}", note, figure=bits_map(allocation, f"Bits at {name}"))


def about(adapter: KVAdapter) -> str:
    """What an adapter is, for the top of a page."""
    return (
        "One set of nested bases serves every budget: the cache keeps the first coordinates of keys and values, and "
        "how many bits each gets is chosen per layer and head when a cache is made. "
        + ("The bases were trained by distillation." if "training" in adapter.info else "Nothing was trained.")
    )


def write_report(path: Path, adapter: KVAdapter, rows: list[dict], allocation: Allocation, *, title: str) -> None:
    """One HTML page: the table of budgets, KL against bytes, and a map of one allocation."""
    share = min((row["budget"] for row in rows if row["budget"]), default=1.0)
    sections = [quality_section(rows), map_section(allocation, f"{100 * share:.3g}%")]
    if "kl_by_position" in rows[0]:
        sections.insert(1, position_section(rows))
    write_html(path, title, about(adapter), sections, run_meta())


def write_training_report(path: Path, adapter: KVAdapter, *, title: str) -> None:
    """One HTML page: the KL at fixed shares of the ranks over tokens, and what was trained how."""
    training = dict(adapter.info["training"])
    points = [p for p in training.pop("curve") if any(name.startswith("kl") for name in p)]
    rows = [
        {"tokens": p["tokens"], "kl": p[name], "share": f"{float(name[3:]):.4g}"}
        for p in points
        for name in p
        if name.startswith("kl_")
    ]
    figure = curve(rows, Scale("tokens", "tokens trained on"), KL, "share", "Held-out text while training")
    note = (
        "Each line is a share of the ranks, exact tokens not counted. Keys and values are cut by masks here, and "
        "every token reads its history as a decode would."
    )
    columns = {name: f"KL at {100 * float(name[3:]):.4g}%" if name.startswith("kl_") else name for name in points[0]}
    sections = [Section("KL over tokens", note, rows=points, columns=columns, figure=figure)]
    sections.append(Section("Options", "What this adapter was trained with.", rows=settings(training)))
    intro = "Nested bases, turned by training so that small caches follow the full model."
    write_html(path, title, intro, sections, run_meta(training.get("seconds")))
