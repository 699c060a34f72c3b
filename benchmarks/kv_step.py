"""What a training step costs over the least that distillation costs: a plain forward and backward pass through the
frozen model and the teacher's forward pass.

    OMP_WAIT_POLICY=passive python benchmarks/kv_step.py [--threads 1] [--steps 5]

Steps are interleaved, medians reported. Rows are tokens per second and the ratio to the least (target: 1.4).
"""

import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from timing import medians

from nestling import kv
from nestling.kv.integration.attach import attach, decoder_and_head
from nestling.kv.simulation.student import Student
from nestling.kv.training.config import PRESETS, TrainConfig
from nestling.kv.training.sampling import schedule
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table


def jobs(lm, adapter: kv.KVAdapter, ids: torch.Tensor) -> dict:
    """Steps by name: functions without arguments."""

    def teacher() -> None:
        with torch.no_grad():
            decoder_and_head(lm)[0](input_ids=ids, use_cache=False)

    def plain() -> None:
        inputs = lm.get_input_embeddings()(ids).detach().requires_grad_()
        lm(inputs_embeds=inputs, use_cache=False, labels=ids).loss.backward()

    def training(preset: str):
        config = TrainConfig(preset=preset)
        ranks = schedule(config.sampling, adapter, allocation=config.allocation)
        weights = {"kl_weight": config.kl_weight, "ce_weight": config.ce_weight}
        student = Student(lm, adapter, sinks=config.sinks, window=config.window, **weights).train()

        def step() -> None:
            student(ids, torch.stack([ranks(row) for row in range(len(ids))]))["loss"].backward()
            student.zero_grad()

        return step

    return {"teacher": teacher, "plain": plain, **{preset: training(preset) for preset in PRESETS}}


def main(
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    adapter: str = typer.Option("smollm2", help="Alias or folder of an adapter."),
    shapes: str = typer.Option("4x512,2x1024", help="Texts a step times tokens a text."),
    steps: int = typer.Option(5, help="Timed steps of each kind, after one that is not."),
    threads: int = typer.Option(1, help="Threads of torch."),
    out: Path = typer.Option(Path("benchmarks/results/kv_step.json")),
):
    began = time.monotonic()
    torch.set_num_threads(threads)
    lm, _ = load_model(model)
    lm.requires_grad_(False)
    attach(lm)
    nested, rows = kv.KVAdapter.from_pretrained(adapter), []
    for shape in shapes.split(","):
        batch, length = map(int, shape.split("x"))
        work = jobs(lm, nested, torch.randint(0, lm.config.vocab_size, (batch, length)))
        median = medians(work, steps)
        least = median["teacher"] + median["plain"]
        for name, seconds in median.items():
            row = {"model": Path(model).name, "method": name, "shape": shape, "ms": 1000 * seconds}
            rows.append({**row, "tokens_per_s": batch * length / seconds, "over_least": seconds / least})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, run_meta(time.monotonic() - began))
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
