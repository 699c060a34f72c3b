"""Draws the README's pictures from the committed results, into docs.

python benchmarks/figures.py
"""

import re

import matplotlib
from matplotlib.figure import Figure
from names import CACHES, ENCODERS, MODELS
from tables import ROOT, load

from nestling.report.figures import curve

MODEL = "e5-small"
SHAPE = (32, 128)  # texts and tokens of the batch whose speed is shown


def kv_bits() -> Figure:
    """KL by bytes: ranks and bits together, and integers of each kind, a line from their 8 or 4 bits to their 2."""
    rows = [row for row in load("kv_bits") if row["model"] == "smollm2"]
    names = [re.sub(r"int\d|, \d bits.*", "", CACHES[row["method"]]) or "plain integers" for row in rows]
    kinds = [{**row, "kind": name} for row, name in zip(rows, names, strict=True)]
    lines = ("nestling", "ranks only", "plain integers", "Hadamard", "KIVI", "Quanto")
    shown = [row for row in kinds if row["kind"] in lines]
    return curve(
        shown, "bytes_share", "kl", "kind", title="SmolLM2-135M: what a smaller cache costs",
        xlabel="share of the bf16 cache", ylabel="KL to the full cache, nats", log_y=True, percent_x=True,
    )  # fmt: skip


def embed_quality() -> Figure:
    """STS by encoding speed: a line for each method, a point for each size."""
    speed = {
        row["model"]: row["texts_per_s"]
        for row in load("embed_speed")
        if row["encoder"] == MODEL and (row["batch"], row["tokens"]) == SHAPE
    }
    rows = [
        {**row, "method": ENCODERS[row["method"]], "speed": speed[row["size"]], "sts": 100 * row["mean_sts"]}
        for row in load("embed_quality")
        if row["model"] == MODEL and row["seed"] == 0
    ]
    return curve(
        rows, "speed", "sts", "method", title=f"{MODELS[MODEL]}: quality and speed of six sizes",
        xlabel="texts a second, one thread, 32 texts of 128 tokens", ylabel="STS, Spearman x 100",
    )  # fmt: skip


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "nestling", "svg.fonttype": "none"})
    for draw in (kv_bits, embed_quality):
        draw().savefig(ROOT / "docs" / f"{draw.__name__}.svg", metadata=dict.fromkeys(("Creator", "Date")))


if __name__ == "__main__":
    main()
