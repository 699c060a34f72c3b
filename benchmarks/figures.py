"""Draws the README's picture from the committed results: docs/nestling.svg.

python benchmarks/figures.py
"""

import matplotlib
from columns import ROOT, load
from cost_tables import rows_of
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nestling.report.figures import INK, MARKERS, PALETTE

CACHES = {  # method: name, and the rows of a line
    "nestling": ("bits",),
    "KIVI": ("kivi-int4", "kivi-int3", "kivi-int2"),
    "TurboQuant, simulated": ("turbo-4", "turbo-3"),
    "plain integers": ("int8", "int4", "int3"),
}
ENCODER = "e5-small"
ENCODERS = {
    "nestling, one training": "srl",
    "six separate models": "separate",
    "Matryoshka2dLoss": "st-2d",
    "the model, cut": "cut",
}
SHAPE = (32, 128)  # texts and tokens of the batch whose speed is shown


def caches(axes: Axes) -> None:
    """KL to the full cache over bytes."""
    rows = rows_of("smollm2")
    for i, (name, methods) in enumerate(CACHES.items()):
        line = sorted((row["bytes_share"], row["kl"]) for row in rows if row["method"] in methods)
        _line(axes, line, i, name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    _dress(axes, "KV cache: loss over size", "share of the bf16 cache (SmolLM2, 2,048 tokens)", "KL, nats a token")


def encoders(axes: Axes) -> None:
    """STS over encoding speed, a point for each size."""
    speed = {
        row["model"]: row["texts_per_s"]
        for row in load("embed_speed")
        if row["encoder"] == ENCODER and (row["batch"], row["tokens"]) == SHAPE
    }
    rows = [row for row in load("embed_quality") if row["model"] == ENCODER and row["seed"] == 0]
    full = next(row for row in rows if row["method"] == "full-then-cut" and row["size"] == "12x384")
    for i, (name, method) in enumerate(ENCODERS.items()):
        own = [row for row in rows if row["method"] == method]
        if method == "separate":  # its largest model is the one that was trained at full size
            own.append(full)
        _line(axes, sorted((speed[row["size"]], 100 * row["mean_sts"]) for row in own), i, name)
    _dress(
        axes,
        "Encoder: quality over speed",
        f"texts a second, one thread ({ENCODER}, six sizes)",
        "STS, Spearman x 100",
    )


def _line(axes: Axes, points: list[tuple[float, float]], place: int, name: str) -> None:
    width = 2.4 if place == 0 else 1.4
    axes.plot(*zip(*points, strict=True), label=name, color=PALETTE[place], marker=MARKERS[place], linewidth=width)


def _dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "nestling", "svg.fonttype": "none"})
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    caches(left)
    encoders(right)
    figure.savefig(ROOT / "docs" / "nestling.svg", metadata=dict.fromkeys(("Creator", "Date")))


if __name__ == "__main__":
    main()
