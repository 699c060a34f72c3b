"""Quality of encoders of several sizes, made in several ways: STS and retrieval of every cup, minutes and memory.

    python benchmarks/embed_quality.py --data FOLDER --work FOLDER --model e5-small [--ways srl,cut]

Every training is run in a process of its own, whose peak memory is reported; minutes are without the dev set, and with
the embedding of all texts by a teacher. Ways that are in the results file already with that seed are not measured
again, and trainings in WORK, which is of one seed, are not run again: a killed run goes on.
"""

import json
import time
from pathlib import Path

import typer
from embed_data import dev_set, held_out_sets, triplets
from embed_rivals import WAYS, Job, Sized, apart, loaded, projections_of
from rich.console import Console

from nestling import embed
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.loading import load_encoder
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

RUN = ("command", "date", "commit", "seconds")  # of run_meta


def measured(sized: Sized, way: str, job: Job, data: Path, name: str) -> list[dict]:
    """Rows of one encoder."""
    sets, model = held_out_sets(data), loaded(sized.folder, job.length)
    if job.bf16:
        model.bfloat16()  # its vectors are pooled, turned and compared in fp32
    evaluator = embed.GridEvaluator(sized.ladder, **sets, projections=projections_of(sized), progress=True)
    partial = job.work / f"{way}-{sized.ladder.full}.partial.json"
    found = evaluator.rows(model, model_name=name, method=way, partial=partial)
    cost = {"minutes": sized.minutes, "peak_mib": sized.peak_mib}
    named = ("model", "method", "size")
    return [{**{key: row[key] for key in named}, "seed": job.seed, **row, **cost} for row in found]


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    work: Path = typer.Option(..., help="Folder of trained models, of this model and seed alone."),
    model: str = typer.Option("e5-small", help="Folder or hub id."),
    name: str | None = typer.Option(None, help="Of the model, in the results."),
    ladder: str = typer.Option("2x32,4x64,6x128,8x192,10x256,12x384", help="The sizes."),
    ways: str = typer.Option(",".join(WAYS), help="What is run."),
    teacher: str | None = typer.Option(None, help="Folder or hub id of the strong teacher, of srl-teacher."),
    steps: int = typer.Option(75),
    batch: int = typer.Option(64, help="Rows a step."),
    learning_rate: float = typer.Option(1e-4, help="Of all trainings."),
    seed: int = typer.Option(0),
    bf16: bool = typer.Option(False, help="Train under autocast and measure in bf16: twice as fast where it is."),
    length: int = typer.Option(128, help="Tokens of a text that is measured."),
    out: Path = typer.Option(Path("benchmarks/results/embed_quality.json"), help="Joined with what is there."),
):
    chosen = ways.split(",")
    if unknown := set(chosen) - set(WAYS):
        raise typer.BadParameter(f"--ways has no {', '.join(sorted(unknown))}: expected some of {', '.join(WAYS)}")
    if "srl-teacher" in chosen and teacher is None:
        raise typer.BadParameter("the way srl-teacher needs --teacher: name one, or leave the way out of --ways")
    encoder = load_encoder(model)
    rows = triplets(data, steps * batch, seed, stored_prompts(encoder))
    cups, dev = Ladder.parse(ladder), dev_set(data)
    job = Job(model, cups, rows, dev, work, steps, batch, learning_rate, seed, teacher, bf16, length)
    label = name or Path(model).name
    settings = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "ladder": ladder}
    settings |= {"bf16": bf16, "length": length}
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"settings": {}, "runs": []}}
    known = old["meta"]["settings"].setdefault(label, settings)
    if known != settings:
        raise typer.BadParameter(f"{out.name} has other settings for {label}, {known} and not {settings}")
    job.begin()
    found, runs = old["rows"], old["meta"]["runs"]
    for way in chosen:
        if any((row["model"], row["method"], row["seed"]) == (label, way, seed) for row in found):
            continue
        start = time.monotonic()
        for sized in WAYS[way](job):
            found += apart(measured, sized, way, job, data, label)
        meta = run_meta(time.monotonic() - start)
        taught = {"teacher": Path(str(teacher)).name} if way == "srl-teacher" else {}
        runs.append({"model": label, "method": way, "seed": seed} | taught | {key: meta[key] for key in RUN})
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found, {**meta, "settings": old["meta"]["settings"], "runs": runs})
    console = Console()
    columns = ("model", "method", "size", "seed", "mean_sts", "mean_ndcg", "mean_recall", "minutes", "peak_mib")
    console.print(table([{key: row.get(key) for key in columns} for row in found]))


if __name__ == "__main__":
    typer.run(main)
