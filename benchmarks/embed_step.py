"""What a step of SRL costs over a step of plain fine-tuning at full size.

    OMP_WAIT_POLICY=passive python benchmarks/embed_step.py --data FOLDER --model FOLDER [--threads 1] [--steps 5]

The same triplets for all, forward and backward pass and AdamW's step. Steps are interleaved, medians reported.
`over_full` is over plain fine-tuning by our loss, whose texts are embedded by length as SRL's are (target: 1.3);
`stock` is sentence-transformers' own MultipleNegativesRankingLoss, whose columns are padded to their longest text.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import typer
from embed_data import triplets
from embed_rivals import STOCK, TRAINED_LENGTH, loaded
from rich.console import Console
from sentence_transformers.sentence_transformer import losses
from timing import medians

from nestling import embed
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import fit_projections
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table


def step(model, loss, columns: list[list[str]]) -> Callable[[], None]:
    """One step of the optimiser on these texts."""
    optimiser = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=1e-5)

    def taken() -> None:
        parts = loss([model.preprocess(column) for column in columns], None)
        (sum(parts.values()) if isinstance(parts, dict) else parts).backward()
        optimiser.step()
        optimiser.zero_grad()

    return taken


def losses_of(ladder: Ladder, texts: list[str]) -> dict[str, Callable]:
    """By name, the loss of a model around a base loss of it."""

    def srl(model, base):
        turns = fit_projections(model, texts, ladder.layers[:-1])
        loss = embed.StarbucksLoss(model, base, ladder, projections=turns)
        loss.projections.requires_grad_(True)
        return loss

    dims = sorted({cup.dims for cup in ladder}, reverse=True)
    ours = {"full": lambda model, base: embed.StarbucksLoss(model, base, Ladder([ladder.full])), "srl": srl}
    stock = {name: partial(loss, matryoshka_dims=dims) for name, loss in STOCK.items()}
    return {**ours, "stock": lambda model, base: base, **stock}


def ways(folder: str, ladder: Ladder, columns: list[list[str]]) -> dict[str, Callable[[], None]]:
    """Steps by name, each of a model of its own."""
    made: dict[str, Callable[[], None]] = {}
    for name, loss in losses_of(ladder, columns[0]).items():
        model = loaded(folder, TRAINED_LENGTH).train()
        made[name] = step(model, loss(model, losses.MultipleNegativesRankingLoss(model)), columns)
    return made


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option(..., help="Folder or hub id."),
    ladder: str = typer.Option("2x32,4x64,6x128,8x192,10x256,12x384", help="The sizes."),
    batch: int = typer.Option(64, help="Triplets a step."),
    steps: int = typer.Option(5, help="Timed steps of each kind, after one that is not."),
    threads: int = typer.Option(1, help="Threads of torch."),
    out: Path = typer.Option(Path("benchmarks/results/embed_step.json")),
):
    began = time.monotonic()
    torch.set_num_threads(threads)
    rows = triplets(data, batch, 0, stored_prompts(load_encoder(model)))
    columns = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    work = ways(model, Ladder.parse(ladder), columns)
    median = medians(work, steps)
    found = [
        {"model": Path(model).name, "method": name, "batch": len(rows), "seconds": seconds,
         "texts_per_s": 3 * len(rows) / seconds, "over_full": seconds / median["full"]}
        for name, seconds in median.items()
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found, {**run_meta(time.monotonic() - began), "ladder": ladder, "length": TRAINED_LENGTH})
    Console().print(table(found))


if __name__ == "__main__":
    typer.run(main)
