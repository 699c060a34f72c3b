"""What a smaller cache costs, by length: KL with its tail and its course over the text, beside the field's caches.

    python benchmarks/kv_cost.py --data FOLDER                                       # a night on two cores
    python benchmarks/kv_cost.py --data FOLDER --quick --out quick.json              # ten minutes
    python benchmarks/kv_cost.py --data FOLDER --model gemma3 --adapter FOLDER --contexts 1024,2048,4096

Text is WikiText's valid articles. Ours keep the exact tokens that they keep by default, and, as `bits-window-64`, as
many as the rivals: 4 first and at least 64 recent ones, in bf16 there and at 8 bits here. Bytes are those held at the
end of a window. `control` is the full cache itself, read in the same chunks. A killed run goes on where it stopped,
and separate runs meet in one file.
"""

import json
import time
from functools import partial as bind
from pathlib import Path

import rivals
import torch
import typer
from kv_bits import BASELINES
from kv_quality import merged, numbers, of_bf16, spread_windows, texts
from rich.console import Console
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from nestling import kv
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.kv.integration.attach import stock_layers, text_config
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

OURS = {"bits": None, "bits-window-64": 64}  # method: recent tokens
SIMULATED = {
    "fp8": rivals.fp8_cache,
    "turbo-4": bind(rivals.turbo_cache, bits=4),
    "turbo-3": bind(rivals.turbo_cache, bits=3),
    "kvarn-4-2": rivals.kvarn_cache,
}
PLAIN = ("int8", "int4", "int3", "hadamard-int4", "hadamard-int3", "kivi-int4", "kivi-int3", "kivi-int2")
THEIRS = {name: bind(rivals.windowed, make) for name, make in SIMULATED.items()}
THEIRS |= {name: bind(rivals.windowed, BASELINES[name]) for name in PLAIN}
METHODS = ["control", *OURS, *THEIRS, "oscar-2"]
LONG = ("control", "bits", "int8", "int4", "kivi-int4", "kivi-int3")  # at the longest contexts
CALIBRATION = (16, 1024)  # texts and tokens, of OSCAR
SHOWN = ("context", "method", "budget", "bytes_share", "kl", "kl_99", "kl_first", "kl_last", "top1", "next_token")


def control(config: PreTrainedConfig) -> Cache:
    return Cache(layers=stock_layers(config))


def candidates(lm, adapter: kv.KVAdapter, methods: list[str], shares: list[float], context: int, rotations) -> list:
    config, found = text_config(lm), []
    for name in methods:
        if name in OURS:
            options = {"context": context, "window": OURS[name], "exact_prompt": False, "dtype": torch.bfloat16}
            configs = {share: kv.CacheConfig(budget=share, **options) for share in shares}
            found += [Candidate(name, share, bind(kv.NestedCache, lm, adapter, c)) for share, c in configs.items()]
        elif name == "oscar-2":
            make = bind(rivals.windowed, bind(rivals.oscar_cache, rotations=rotations()))
            found.append(Candidate(name, None, bind(make, config)))
        else:
            found.append(Candidate(name, None, bind(control if name == "control" else THEIRS[name], config)))
    return found


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    adapter: str = typer.Option("smollm2", help="Folder, hub id or alias."),
    contexts: str = typer.Option("1024,2048,4096,8192", help="Tokens of a window."),
    methods: str = typer.Option(",".join(METHODS), help="What is measured."),
    budgets: str = typer.Option("0.5,0.3125,0.25,0.1875,0.125,0.09375,0.0625", help="Shares of the full cache."),
    windows: int = typer.Option(2, help="Windows of text; one at 8,192 tokens."),
    chunk: int = typer.Option(64, help="Tokens that go through a cache at once."),
    quick: bool = typer.Option(False, help="1,024 tokens, two budgets, two rivals."),
    out: Path = typer.Option(Path("benchmarks/results/kv_cost.json"), help="Results; joined with what is there."),
):
    start, chosen = time.monotonic(), methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        raise typer.BadParameter(f"unknown methods {sorted(unknown)}; known: {', '.join(METHODS)}")
    if quick:
        contexts, budgets, windows, chosen = "1024", "0.25,0.125", 1, ["bits", "int4", "kivi-int4"]
    lm, tokenizer = load_model(model)
    nested = kv.KVAdapter.from_pretrained(adapter)
    calibration, documents = texts(data)
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"runs": []}}
    rows = old["rows"]
    out.parent.mkdir(parents=True, exist_ok=True)
    store = ResultStore(out.with_suffix(".partial.json"), {"model": Path(model).name, "data": "wikitext103"})

    def rotations():
        return rivals.oscar_rotations(lm, spread_windows(tokenizer, calibration, CALIBRATION[1], CALIBRATION[0]))

    for context in map(int, numbers(contexts)):
        long = context > 2048
        entrants = candidates(
            lm, nested, [m for m in chosen if not long or m in LONG], numbers(budgets), context, rotations
        )
        ids = spread_windows(tokenizer, documents, context, 1 if context > 4096 else windows)
        config = EvalConfig(windows=len(ids), length=context, chunk=chunk)
        new = compare(lm, tokenizer, ids, entrants, config, store=store)
        of_bf16(new)
        others = [row for row in rows if row["context"] != context]
        same = merged([row for row in rows if row["context"] == context], new, METHODS)
        rows = others + [row | {"context": context} for row in same]
    meta = run_meta(time.monotonic() - start)
    run = {"model": Path(model).name, "contexts": contexts, "windows": windows, "chunk": chunk}
    run |= {k: meta[k] for k in ("command", "date", "commit", "seconds")}
    write_json(out, rows, {**meta, "runs": [*old["meta"]["runs"], run]})
    store.path.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table(rows, {name: name for name in SHOWN}))


if __name__ == "__main__":
    typer.run(main)
