"""Quality of MiniLM's small sizes by the texts that they are distilled on, and beside sizes that are trained alone.

    python benchmarks/elastic_curve.py --data FOLDER --texts texts.txt --work FOLDER [--counts 10000,30000,100000]

Each text is seen once. Alone, each depth has a training of its own, on the same texts for as many steps. Trainings go
on from their checkpoints in the work folder, and what is in the results already is not trained again.
"""

import json
import time
from pathlib import Path

import torch
import typer
from embed_data import RETRIEVAL, held_out_sets
from rich.console import Console

from nestling import ElasticEncoder
from nestling.data.texts import read_texts
from nestling.embed import GridEvaluator, TrainConfig
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SIZES = "1x128,2x192,3x256,4x384,6x384"
SHOWN = ("1x128", "1x384", "2x192", "2x384", "3x256", "3x384", "4x384")
TOGETHER, ALONE = "together", "alone"
COLUMNS = ("texts", "way", "size", "mean_sts", "mean_ndcg", "seconds")


def measured_on(data: Path) -> tuple[Path, ...]:
    """The files whose texts are not trained on."""
    folders = (data / "retrieval" / name for name in RETRIEVAL)
    found = [folder / f"{part}.jsonl.gz" for folder in folders for part in ("corpus", "queries")]
    return (*held_out_sets(data)["sts"].values(), *found)


def trained(model: str, sizes: str, texts: list[str], config: TrainConfig) -> tuple[ElasticEncoder, float]:
    """An encoder whose small sizes are trained, or were in an earlier run, and the seconds that it took now."""
    assert config.output_dir is not None
    start = time.monotonic()
    if config.output_dir.exists():
        return ElasticEncoder.from_pretrained(str(config.output_dir)), 0.0
    encoder = ElasticEncoder.from_pretrained(model, sizes, adapter=None)
    return encoder.train(texts, config), time.monotonic() - start


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    texts: Path = typer.Option(..., help="What elastic_data.py writes."),
    work: Path = typer.Option(..., help="Folder of the trainings."),
    model: str = typer.Option("minilm", help="Folder, hub id or alias."),
    sizes: str = typer.Option(SIZES, help="Sizes that are trained."),
    shown: str = typer.Option(",".join(SHOWN), help="Sizes that are measured."),
    counts: str = typer.Option("10000,30000,100000", help="Texts of the trainings."),
    alone: int = typer.Option(30_000, help="Texts of those of one depth each; 0: none."),
    length: int = typer.Option(128, help="Tokens of a text that is measured."),
    out: Path = typer.Option(Path("benchmarks/results/elastic_curve.json"), help="Joined with what is there."),
):
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"runs": []}}
    rows, runs = old["rows"], old["meta"]["runs"]
    found = list(read_texts(texts, layout="lines"))
    evaluator = GridEvaluator(**held_out_sets(data), progress=True)
    *small, full = sizes.split(",")
    jobs = [(int(count), TOGETHER, sizes) for count in counts.split(",")]
    jobs += [(alone, ALONE, f"{size},{full}") for size in small if alone]
    for count, way, ladder in jobs:
        depth = ladder.split("x")[0]
        key = {"model": Path(model).name, "texts": count, "way": way if way == TOGETHER else f"{way} {depth}"}
        if any(key.items() <= row.items() for row in rows):
            continue
        folder = work / f"{count}-{key['way'].replace(' ', '-')}"
        config = TrainConfig(
            output_dir=folder, texts=count, exclude=measured_on(data),
            resume=folder.with_name(f"{folder.name}-checkpoints").exists(),
        )  # fmt: skip
        encoder, seconds = trained(model, ladder, found, config)
        own = [size for size in shown.split(",") if way == TOGETHER or size.split("x")[0] == depth]
        encoder = ElasticEncoder(encoder.model, ",".join(own), adapter=encoder.adapter)
        encoder.model.max_seq_length = length
        with torch.autocast("cpu", dtype=torch.bfloat16):
            new = encoder.evaluate(evaluator=evaluator, method=way, partial=out.with_suffix(".partial"))
        rows += [{**row, **key, "seconds": seconds} for row in new]
        meta = run_meta(seconds)
        runs.append(key | {name: meta[name] for name in ("commit", "date", "seconds", "command")})
        write_json(out, rows, {**meta, "runs": runs})
        out.with_suffix(".partial").unlink(missing_ok=True)
    Console().print(table([{key: row.get(key) for key in COLUMNS} for row in rows]))


if __name__ == "__main__":
    typer.run(main)
