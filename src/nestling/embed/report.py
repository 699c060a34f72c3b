"""The wing's HTML pages: what was measured for every size, a training's curves, and the demo's findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.embed.evaluation.agreement import NOTE
from nestling.embed.evaluation.results import cost_figure, grid_figure
from nestling.report.figures import Scale, curve
from nestling.report.page import Section, write_html
from nestling.report.results import run_meta
from nestling.report.tables import is_table, settings

Row = Mapping[str, Any]
COSTS = "Layers save encode time, dims save index bytes and search time; neither saves the other."


def write_evaluation(path: Path, rows: Sequence[Row], *, title: str, grid: bool) -> None:
    """The table of a `GridEvaluator` or of `agreement`, quality by cost, and a heat map with ``grid``."""
    labelled = any(key in row for row in rows for key in ("mean_sts", "mean_ndcg"))
    column = None if labelled else "agreement"
    note = "Correlations, nDCG@10 and recall@100 as fractions. " if labelled else f"{NOTE} "
    sections = [Section("Quality of every size", note + COSTS, rows=_shown(rows), figure=cost_figure(rows, column))]
    if grid:
        note = "Layers downwards, dims across; cells beside the ladder's sizes were not trained."
        sections.append(Section("Every depth at every width", note, figure=grid_figure(rows, column)))
    intro = "One encoder, measured at every size from one pass over the texts."
    write_html(path, title, intro, sections, run_meta())


def write_training(path: Path, info: Mapping[str, Any], *, title: str) -> None:
    """The loss of every size by step, what was measured on held-out data, and the settings."""
    write_html(
        path, title, "An encoder, trained at every size at once.",
        [*training_sections(info), Section("Settings", rows=settings(_without_curve(info)))], run_meta(),
    )  # fmt: skip


def training_sections(info: Mapping[str, Any]) -> list[Section]:
    """The curves of a training: losses, held-out means if there are any, and what was measured in the end."""
    points = info["curve"]
    measured = [
        {"step": p["step"], "value": p[name], "size": name.rsplit("_mean_", 1)[0]}
        for p in points
        for name in p
        if name.endswith(("_mean_sts", "_mean_ndcg", "_mean_agreement"))
    ]
    losses = [
        {"step": p["step"], "loss": value, "part": name.replace("_", " ").replace("kl", "KL")}
        for p in points
        if "loss" in p
        for name, value in p.items()
        if name not in ("step", "loss") and "mean" not in name and not name.startswith("eval_")
    ]
    steps = Scale("step", "step")
    figure = curve(losses, steps, Scale("loss", "loss", log=True), "part", "While training")
    note = "A batch's loss, and the KL to the teacher's rankings."
    if any(row["part"].startswith("mlm") for row in losses):
        note = "Nats per masked token: by the encoder (mlm), and by the decoder from the sentence vector (dec)."
    sections = [Section("Loss of every size", note, figure=figure)]
    if measured:
        what = Scale("value", "mean Spearman, nDCG@10 or agreement")
        figure = curve(measured, steps, what, "size", "Held-out data")
        sections.append(Section("Quality while training", figure=figure))
    stock = [
        {k.removeprefix("eval_"): v for k, v in p.items() if k == "step" or k.startswith("eval_")} for p in points
    ]
    if is_table(rows := info.get("measured")):
        sections.append(Section("What the sizes are worth", "Measured on held-out data when it ended.", rows=rows))
    if stock := [row for row in stock if len(row) > 1]:
        sections.append(Section("Measured by stock evaluators", "On the full model.", rows=stock))
    return sections


def write_demo(
    path: Path,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    answers: Sequence[Row],
    words: str,
    *,
    title: str,
    seconds: float,
) -> None:
    """The demo: what each size takes and how well it agrees with the full one, and what one of them finds."""
    points = [
        {"size": row["size"], "agreement": row[method], "method": columns[method].removeprefix("agreement, ")}
        for method in ("cut", "made")
        for row in rows
    ]
    agreement = Scale("agreement", "mean Spearman on unseen sentences")
    figure = curve(points, Scale("size", "size"), agreement, "method", "Agreement with the full model")
    sections = [
        Section("The sizes", f"{NOTE.partition(';')[0]}. {COSTS} {words}", rows=rows, columns=columns, figure=figure),
        Section("Searching the pages", "The two nearest pages to each query.", rows=answers),
    ]
    intro = (
        "One encoder in several sizes: each is some of its layers and some of its numbers, so that it agrees with the "
        "full model as far as it can. The full model is as it was."
    )
    write_html(path, title, intro, sections, run_meta(seconds))


def _shown(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Without what says nothing: empty cells, and the model, method and seed where all rows have the same."""
    same = {key for key in ("model", "method", "seed") if len({row.get(key) for row in rows}) == 1}
    return [{key: value for key, value in row.items() if value != "" and key not in same} for row in rows]


def _without_curve(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name != "curve"}
