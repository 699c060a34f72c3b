"""Quality of encoders of several sizes, made in several ways: STS and retrieval of every cup, minutes and memory.

    python benchmarks/embed_quality.py --data FOLDER --work FOLDER --model e5-small [--ways srl,cut]

Every way is run in a process of its own, whose peak memory is reported. Ways that are in the results file already are
not measured again, and trainings in WORK are not run again: a killed run goes on.
"""

import json
import multiprocessing
import time
from pathlib import Path

import torch
import typer
from embed_data import dev_set, held_out_sets, triplets
from embed_rivals import WAYS, Job
from rich.console import Console

from nestling import embed
from nestling.embed.encode import stored_prompts
from nestling.ladder import Ladder
from nestling.report import run_meta, table, write_json

MEASURED_LENGTH = 128  # tokens of a text


def measured(way: str, job: Job, data: Path, name: str) -> list[dict]:
    """Rows of one way."""
    rows = []
    for sized in WAYS[way](job):
        turns = None
        if sized.turns is not None:
            turns = {depth: sized.turns.get(depth, torch.nn.Identity()) for depth in sized.ladder.layers}
        evaluator = embed.GridEvaluator(sized.ladder, **held_out_sets(data), rotations=turns, progress=True)
        partial = job.work / f"{way}-{sized.ladder.full}.partial.json"
        found = evaluator.rows(sized.encoder(MEASURED_LENGTH), model_name=name, method=way, partial=partial)
        rows += [{**row, "minutes": sized.minutes, "peak_mib": sized.peak_mib} for row in found]
    return rows


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    work: Path = typer.Option(..., help="Folder of trained models."),
    model: str = typer.Option("e5-small", help="Folder or hub id."),
    name: str | None = typer.Option(None, help="Of the model, in the results."),
    ladder: str = typer.Option("2x32,4x64,6x128,8x192,10x256,12x384", help="The cups."),
    ways: str = typer.Option(",".join(WAYS), help="What is run."),
    teacher: str | None = typer.Option(None, help="Folder or hub id of the strong teacher."),
    steps: int = typer.Option(75),
    batch: int = typer.Option(64, help="Rows a step."),
    learning_rate: float = typer.Option(1e-4, help="Of all trainings."),
    seed: int = typer.Option(0),
    out: Path = typer.Option(Path("benchmarks/results/embed_quality.json"), help="Joined with what is there."),
):
    encoder = embed.load_encoder(model)
    rows = triplets(data, steps * batch, seed, stored_prompts(encoder))
    job = Job(model, Ladder.parse(ladder), rows, dev_set(data), work, steps, batch, learning_rate, seed, teacher)
    label = name or Path(model).name
    settings = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "ladder": ladder, "seed": seed}
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"settings": {}}}
    known = old["meta"]["settings"].setdefault(label, settings)
    if known != settings:
        raise typer.BadParameter(f"{out.name} has other settings for {label}, {known} and not {settings}")
    found, console = old["rows"], Console()
    work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for way in ways.split(","):
        if any(row["model"] == label and row["method"] == way for row in found):
            continue
        start = time.monotonic()
        with context.Pool(1) as pool:
            found += pool.apply(measured, (way, job, data, label))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found, {**run_meta(time.monotonic() - start), "settings": old["meta"]["settings"]})
    columns = ("model", "method", "cup", "mean_sts", "mean_ndcg", "mean_recall", "minutes", "peak_mib")
    console.print(table([{key: row.get(key) for key in columns} for row in found]))


if __name__ == "__main__":
    typer.run(main)
