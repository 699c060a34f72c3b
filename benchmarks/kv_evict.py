"""Half of the tokens with half of the coordinates, beside a quarter of either: eviction (H2O) and nested caches.

    python benchmarks/kv_evict.py --data FOLDER [--adapter smollm2] [--windows 2] [--length 2048]

KL and perplexity on WikiText, history read in chunks of 16. All keep 4 sinks and the most recent tokens exact. Bytes
are those held at the end of a window.
"""

import time
from functools import partial as bind
from pathlib import Path

import torch
import typer
from kv_quality import spread_windows, texts
from rich.console import Console

from nestling import kv
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SHARES = ((1.0, 0.5), (0.5, 1.0), (1.0, 0.25), (0.5, 0.5), (0.25, 1.0))  # of the tokens, of the elements of each


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    adapter: str = typer.Option("smollm2", help="Alias or folder of an adapter."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    windows: int = typer.Option(2, help="Windows of text."),
    length: int = typer.Option(2048, help="Tokens a window."),
    chunk: int = typer.Option(16, help="Tokens that go through a cache at once."),
    out: Path = typer.Option(Path("benchmarks/results/kv_evict.json")),
):
    start = time.monotonic()
    lm, tokenizer = load_model(model)
    nested = kv.KVAdapter.from_pretrained(adapter)
    options = {"context": length, "exact_prompt": False, "dtype": torch.bfloat16, "quantise": False}
    entrants = [
        Candidate(
            f"{tokens:.0%} tokens x {elements:.0%} features", tokens * elements,
            bind(kv.NestedCache, lm, nested, kv.CacheConfig(budget=elements, keep_tokens=tokens, **options)),
        )
        for tokens, elements in SHARES
    ]  # fmt: skip
    settings = {"model": Path(model).name, "windows": windows, "length": length, "chunk": chunk}
    store = ResultStore(out.with_suffix(".partial.json"), settings)
    ids = spread_windows(tokenizer, texts(data)[1], length, windows)
    config = EvalConfig(windows=windows, length=length, chunk=chunk)
    rows = compare(lm, tokenizer, ids, entrants, config, store=store)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, {**run_meta(time.monotonic() - start), "settings": settings})
    store.path.unlink(missing_ok=True)
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
