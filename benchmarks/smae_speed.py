"""Speed and memory of a pre-training step, against the same losses as one would first write them.

    OMP_WAIT_POLICY=passive python benchmarks/smae_speed.py [--model FOLDER | --layers 6 --dims 256] [--threads 1]

Both take the gradient of the same batch by the same weights, in turns (interleaved); medians are reported. The losses
must agree to 1e-5. Memory is the peak of a process that does nothing else, over what it had before the step; on a GPU
what torch has allocated. Random tokens will do: neither time nor memory depends on them.
"""

import json
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import typer
from embed_rivals import apart
from rich.console import Console
from sentence_transformers import SentenceTransformer
from smae import random_start
from smae_naive import naive
from timing import medians

from nestling.embed.ladder import Ladder
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.parts import Encoder
from nestling.embed.pretraining.autoencoder import MaskedAutoencoder
from nestling.embed.pretraining.collate import Collator
from nestling.embed.pretraining.corpus import Batch, Position
from nestling.embed.pretraining.masking import Masking, Window
from nestling.jobs.progress import progress_bar
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

METHODS = {"naive": naive, "nestling": lambda smae, batch: smae(batch)}
CLOSE = 1e-5  # relative difference of the losses


def autoencoder(model: SentenceTransformer, ladder: str) -> MaskedAutoencoder:
    parts = Encoder.of(model)
    cups = Ladder.parse(ladder) if ladder else Ladder.default(parts.depth, parts.dims)
    return MaskedAutoencoder(model, cups).eval()  # without dropout, so that losses can be compared


def masked(smae: MaskedAutoencoder, count: int, length: int) -> dict[str, torch.Tensor]:
    """Texts of random words of one token, under both masks."""
    words, rng = smae.encoder.tokenizer, np.random.default_rng(0)
    special = set(words.all_special_ids)
    ordinary = np.array([i for i in range(Encoder.of(smae.encoder).backbone.config.vocab_size) if i not in special])
    row = np.array([-1, *range(length - 2), -1])
    first, last = words.cls_token_id, words.sep_token_id
    windows = [Window(np.array([first, *rng.choice(ordinary, length - 2), last]), row) for _ in range(count)]
    (found,) = Collator(Masking(words.mask_token_id, ordinary), 0, len(smae.sizes))(Batch(windows, rng, Position()))
    return {name: tensor.to(smae.encoder.device) for name, tensor in found.items()}


def step(method: str, smae: MaskedAutoencoder, batch: dict[str, torch.Tensor], bf16: bool) -> float:
    """The loss, once its gradient has been taken."""
    smae.zero_grad()
    with torch.autocast(smae.encoder.device.type, torch.bfloat16, enabled=bf16):
        loss = METHODS[method](smae, batch)["loss"]
    loss.backward()
    return loss.item()  # waits for a GPU


def timed(smae: MaskedAutoencoder, batch: dict[str, torch.Tensor], turns: int, bf16: bool) -> dict[str, dict]:
    """Median seconds and the loss of each method."""
    jobs = {name: partial(step, name, smae, batch, bf16) for name in METHODS}
    with progress_bar() as bar:
        bar.add_task("timing", total=None)
        seconds = medians(jobs, turns)
    return {name: {"seconds": seconds[name], "loss": jobs[name]()} for name in METHODS}


def peak_mib(method: str, model: str, ladder: str, count: int, length: int, bf16: bool, threads: int) -> float:
    """In a process of its own: what two steps need beside the model, its gradients among it."""
    torch.set_num_threads(threads)
    smae = autoencoder(load_encoder(model), ladder)
    batch = masked(smae, count, length)
    cuda = smae.encoder.device.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else _mib("VmRSS")
    for _ in range(2):
        step(method, smae, batch, bf16)
    return (torch.cuda.max_memory_allocated() / 2**20 if cuda else _mib("VmHWM")) - before


def _mib(name: str) -> float:
    """Of this process. What getrusage tells would be the parent's peak, if that is higher."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main(
    work: Path = typer.Option(..., help="Folder of a random start."),
    model: str | None = typer.Option(None, help="Folder, hub id or alias; without, random weights."),
    layers: int = typer.Option(6, help="Of random weights."),
    dims: int = typer.Option(256, help="Of random weights."),
    ladder: str = typer.Option("", help="The sizes; by default those for the shape."),
    batch: int = typer.Option(16, help="Texts a step."),
    length: int = typer.Option(128, help="Tokens of a text."),
    turns: int = typer.Option(7, help="Timed steps of each."),
    bf16: bool = typer.Option(False, help="Autocast; losses are not compared then."),
    threads: int = typer.Option(1, help="Of torch."),
    name: str | None = typer.Option(None, help="Of the model, in the results."),
    out: Path = typer.Option(Path("benchmarks/results/smae_speed.json"), help="Joined with what is there."),
):
    began = time.monotonic()
    torch.set_num_threads(threads)
    label = name or (Path(model).name if model else f"random-{layers}x{dims}")
    work.mkdir(parents=True, exist_ok=True)
    source = model or str(random_start(work / f"{label}-start", layers, dims, "minilm", 0))
    smae = autoencoder(load_encoder(source), ladder)
    given = masked(smae, batch, length)
    found = timed(smae, given, turns, bf16)
    difference = abs(found["naive"]["loss"] / found["nestling"]["loss"] - 1)
    if not bf16 and difference > CLOSE:
        raise RuntimeError(f"the losses differ by {difference:.1e}: they must be the same to {CLOSE:g}")
    for method, row in found.items():
        row["mib"] = apart(peak_mib, method, source, ladder, batch, length, bf16, threads)
    size = Encoder.of(smae.encoder).backbone.config.vocab_size
    rows = [
        {
            "model": label, "method": method, "cups": str(smae.sizes), "vocabulary": size,
            "batch": batch, "tokens": length, "bf16": bf16, "device": smae.encoder.device.type,
            "ms": 1000 * row["seconds"], "tokens_per_s": batch * length / row["seconds"], "step_mib": row["mib"],
            "speed_over_naive": found["naive"]["seconds"] / row["seconds"],
            "memory_over_naive": row["mib"] / found["naive"]["mib"], "loss": row["loss"],
        }
        for method, row in found.items()
    ]  # fmt: skip
    key = ("model", "batch", "tokens", "bf16", "device", "cups")
    old = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
    rows = [row for row in old if any(row[k] != rows[0][k] for k in key)] + rows
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, {**run_meta(time.monotonic() - began), "turns": turns})
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
