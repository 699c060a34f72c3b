"""Measures the costs of an adapter again, on long texts of several kinds, and saves it with them.

    python benchmarks/kv_costs.py --data FOLDER --out FOLDER [--adapter smollm2] [--context 8192]

Bases stay as they are. The texts are half of the Brown corpus, a quarter of an
encyclopedia and a quarter of a book; what the benchmarks measure on is not among them.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
import typer

from nestling import kv
from nestling.data.texts import read_texts
from nestling.data.windows import token_windows
from nestling.kv.calibration.fit import measure
from nestling.models import load_model

DOCUMENTS, ENCYCLOPEDIA, BOOK = 400, 0.6, slice(200_000, 800_000)  # of each kind what is drawn from


def pieces(data: Path, tokenizer, count: int, length: int) -> torch.Tensor:
    """Texts ``[count, length]`` of the three kinds, in random order."""
    brown = list(read_texts(str(data / "lm/brown.jsonl.gz")))[:DOCUMENTS]
    wiki = "\n".join(read_texts(str(data / "lm/wiki_demo.txt.gz")))
    book = next(iter(read_texts(str(data / "long/books.jsonl.gz"))))[BOOK]
    kinds = (["\n".join(brown)], count // 2), ([wiki[: int(len(wiki) * ENCYCLOPEDIA)]], count // 4)
    kinds = (*kinds, ([book], count - count // 2 - count // 4))
    windows = [w for texts, n in kinds if n for w in token_windows(tokenizer, texts, length, limit=n)]
    return torch.stack(windows)[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    out: Path = typer.Option(..., help="Where the adapter is saved."),
    model: str = typer.Option("smollm2", help="Alias, folder or hub id."),
    adapter: str = typer.Option("smollm2", help="Folder, hub id or alias."),
    count: int = typer.Option(12, help="Texts."),
    length: int = typer.Option(2048, help="Tokens a text."),
    context: int = typer.Option(8192, help="Tokens over which their positions are spread."),
):
    start = time.monotonic()
    lm, tokenizer = load_model(model)
    old = kv.KVAdapter.from_pretrained(adapter)
    config = kv.FitConfig(pieces=count, piece_length=length, context=context)
    new = measure(lm, old, pieces(data, tokenizer, count, length), config)
    new = replace(new, info={**new.info, "context": context})
    new.save_pretrained(out, half=True)
    print(f"{out}: costs of {count} texts of {length:,} tokens, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
