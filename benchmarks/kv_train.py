"""Trains an adapter of SmolLM2 on a mix of Brown, Wikipedia and books, held-out WikiText beside it, and saves both.

    python benchmarks/kv_train.py --data FOLDER --out FOLDER [--preset paper] [--tokens 400000] [--set window=32]

Killed, the same command with --resume goes on from the last checkpoint. The training curve is in the adapter's config.
"""

import ast
import random
import time
from pathlib import Path

import torch
import typer
from rich.console import Console

from nestling import kv
from nestling.data import read_texts
from nestling.kv.train import RECIPES, train
from nestling.models import load_model
from nestling.report import table
from nestling.tokens import token_windows

SOURCES = ("lm/brown.jsonl.gz", "lm/wiki_demo.txt.gz", "long/books.jsonl.gz")  # in equal shares as far as they go
HELD_OUT = "lm/wikitext103_valid.detok.txt.gz"


def corpus(data: Path, tokenizer, tokens: int, length: int, seed: int) -> torch.Tensor:
    """Windows ``[n, length]``: as many of each source as there are, up to an equal share of ``tokens`` (more of the
    longer ones where one is short), in random order."""
    rng = random.Random(seed)
    wanted, found = tokens // length, []
    pools = []
    for source in SOURCES:
        windows = list(token_windows(tokenizer, read_texts(str(data / source)), length))
        pools.append(rng.sample(windows, len(windows)))
    pools.sort(key=len)
    for left, pool in zip(range(len(pools), 0, -1), pools, strict=True):
        found += pool[: (wanted - len(found)) // left]
    return torch.stack(rng.sample(found, len(found)))


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    out: Path = typer.Option(..., help="The adapter to write; checkpoints go beside it."),
    start: Path | None = typer.Option(None, help="An adapter to start from; by default, a calibration."),
    preset: str = typer.Option("default", help=f"One of {', '.join(RECIPES)}."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    tokens: int = typer.Option(400_000, help="Tokens to train on."),
    length: int = typer.Option(1024, help="Tokens per text."),
    batch: int = typer.Option(2, help="Texts per step."),
    seed: int = typer.Option(0),
    resume: bool = typer.Option(False, help="Go on from the last checkpoint."),
    change: list[str] = typer.Option([], "--set", help="Changes to the preset, such as learning_rate=2e-3."),
    calibration: int = typer.Option(65536, help="Tokens of the calibration, without --start."),
    bf16: bool = typer.Option(False, help="Autocast to bf16: faster where the processor has it."),
):
    began = time.monotonic()
    lm, tokenizer = load_model(model)
    if torch.cuda.is_available():
        lm = lm.cuda()
    windows = corpus(data, tokenizer, tokens, length, seed)
    basis = RECIPES[preset].basis
    if start is None:
        adapter = kv.fit(lm, None, windows, basis, tokens=calibration, length=length)
    else:
        adapter = kv.KVAdapter.from_pretrained(start)
    recipe = {}
    for item in change:
        name, value = item.split("=", 1)
        try:
            recipe[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            recipe[name] = value
    trained = train(
        lm, tokenizer, windows, adapter, preset, folder=out.with_name(f"{out.name}-checkpoints"), tokens=tokens,
        length=length, batch_size=batch, eval_texts=read_texts(str(data / HELD_OUT)), eval_windows=2, seed=seed,
        resume=resume, recipe=recipe, bf16=bf16, eval_steps=max(1, tokens // (length * batch) // 4),
    )  # fmt: skip
    trained.save_pretrained(out)
    points = [p for p in trained.info["training"]["curve"] if any(k.startswith("kl") for k in p)]
    Console().print(table(points, title=f"{preset}: KL on held-out text at shares of the ranks"))
    Console().print(f"{time.monotonic() - began:.0f} s in all. Saved to {out}")


if __name__ == "__main__":
    typer.run(main)
