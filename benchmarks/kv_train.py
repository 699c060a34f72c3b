"""Trains an adapter of SmolLM2 on a mix of six kinds of text, held-out WikiText beside it, and saves both.

    python benchmarks/kv_train.py --data FOLDER --out FOLDER [--preset paper] [--tokens 400000] [--set window=32]

Killed, the same command with --resume goes on from the last checkpoint. The training curve is in the adapter's config.
"""

import ast
import gzip
import json
import random
import time
from pathlib import Path

import torch
import typer
from rich.console import Console

from nestling import kv
from nestling.data.texts import read_texts
from nestling.data.windows import token_windows
from nestling.kv.training.config import PRESETS
from nestling.models import load_model
from nestling.report.tables import table

PIECE = 8192  # characters: of long documents, pieces from all over them are read
HELD_OUT = "lm/wikitext103_valid.detok.txt.gz"


def questions(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return ["\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)]


def conversations(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def sources(data: Path) -> list[list[str]]:
    """Documents of each kind: fiction and news, an encyclopedia, books, manuals, arithmetic, conversations.

    Ranks that were measured on one kind of text are wrong for others: which heads read far depends on what is read.
    """
    pages = list(read_texts(None))
    return [
        list(read_texts(str(data / "lm/brown.jsonl.gz"))),
        list(read_texts(str(data / "lm/wiki_demo.txt.gz"), layout="documents")),
        list(read_texts(str(data / "long/books.jsonl.gz"))),
        [page for number, page in enumerate(pages) if number % 8],  # the others are what the demo measures on
        questions(data / "gen/gsm8k_train.jsonl.gz"),
        conversations(data / "long/longchat_5_topics.jsonl.gz"),
    ]


def corpus(data: Path, tokenizer, tokens: int, length: int, seed: int) -> torch.Tensor:
    """Windows ``[n, length]``: as many of each source as there are, up to an equal share of ``tokens`` (more of the
    longer ones where one is short), in random order."""
    rng, pools = random.Random(seed), []
    for documents in sources(data):
        pieces = [text[i : i + PIECE] for text in documents for i in range(0, len(text), PIECE)]
        shuffled = rng.sample(pieces, len(pieces))
        pools.append(list(token_windows(tokenizer, shuffled, length, limit=tokens // length)))
    pools.sort(key=len)
    wanted, found = tokens // length, []
    for left, pool in zip(range(len(pools), 0, -1), pools, strict=True):
        found += pool[: (wanted - len(found)) // left]
    return torch.stack(rng.sample(found, len(found)))


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    out: Path = typer.Option(..., help="The adapter to write; checkpoints go beside it."),
    start: Path | None = typer.Option(
        None, help="An adapter to start from; by default it is calibrated, and kept as OUT-start."
    ),
    preset: str = typer.Option("default", help=f"One of {', '.join(PRESETS)}."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    tokens: int = typer.Option(400_000, help="Tokens to train on."),
    length: int = typer.Option(1024, help="Tokens per text."),
    batch: int = typer.Option(2, help="Texts per step."),
    seed: int = typer.Option(0),
    resume: bool = typer.Option(False, help="Go on from the last checkpoint."),
    change: list[str] = typer.Option([], "--set", help="Changes to the preset, such as learning_rate=2e-3."),
    calibration: int = typer.Option(65536, help="Tokens of the calibration."),
    evaluations: int = typer.Option(4, help="Points of the training curve, after its start."),
    bf16: bool = typer.Option(False, help="Autocast to bf16: faster where the processor has it."),
):
    began = time.monotonic()
    lm, tokenizer = load_model(model, torch.float32)  # on a GPU too: --bf16 is for the passes, costs stay precise
    windows = corpus(data, tokenizer, tokens, length, seed)
    changes = {}
    for item in change:
        name, value = item.split("=", 1)
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    config = kv.TrainConfig(
        preset=preset, output_dir=out.with_name(f"{out.name}-checkpoints"), tokens=tokens, length=length,
        batch_size=batch, eval_windows=2, seed=seed, resume=resume, bf16=bf16,
        arguments={"eval_steps": max(1, tokens // (length * batch) // evaluations)}, **changes,
    )  # fmt: skip
    start = start or out.with_name(f"{out.name}-start")
    if not start.is_dir():
        fitting = kv.FitConfig(
            basis=config.basis, tokens=calibration, length=length, sinks=config.sinks, window=config.window
        )
        kv.fit(lm, None, windows, fitting).save_pretrained(start)
    adapter = kv.KVAdapter.from_pretrained(start)
    trained = kv.train(lm, tokenizer, windows, adapter, config, eval_texts=read_texts(str(data / HELD_OUT)))
    trained.save_pretrained(out)
    points = [p for p in trained.info["training"]["curve"] if any(k.startswith("kl") for k in p)]
    Console().print(table(points, title=f"{preset}: KL on held-out text at shares of the ranks"))
    Console().print(f"{time.monotonic() - began:.0f} s in all. Saved to {out}")


if __name__ == "__main__":
    typer.run(main)
