"""The table of nested caches beside llama.cpp's, from kv_llamacpp.json."""

from columns import digits, load, percent, table
from names import CACHES


def beside() -> str:
    """A row a cache: bytes, KL, and at each length what it holds, its speed, and that over the engine's full cache."""
    rows = load("kv_llamacpp")
    columns = {"method": ("cache", CACHES.__getitem__), "bytes_share": ("share of bf16", percent)}
    columns |= {"kl": ("KL", digits), "kl_99": ("99 %", digits)}
    for key in rows[0]:
        kind, _, length = key.rpartition("_")
        if kind == "tokens_per_s":
            columns[key] = (f"tokens/s, {int(length):,} tokens", digits)
            columns[f"over_full_{length}"] = ("over full", digits)
    return table(rows, columns)
