"""The paper's Table 1 for SmolLM2: budgets by methods, KL and perplexity on WikiText and six multiple-choice tasks.

    python benchmarks/kv_train.py --data DATA --out RUNS/default                     # each takes hours on a CPU
    python benchmarks/kv_train.py --data DATA --out RUNS/paper --preset paper
    python benchmarks/kv_train.py --data DATA --out RUNS/no-window --set sinks=0 --set window=0
    nestling kv search smollm2 RUNS/paper --method greedy --sinks 0 --window 0 --out RUNS/paper-greedy
    nestling kv search smollm2 RUNS/paper --sinks 0 --window 0 --length 1024 --out RUNS/paper-blend
    python benchmarks/kv_paper.py --data DATA --adapters RUNS [--only kl|tasks] [--rows 200]

RUNS also holds `pca-65536`, `balanced-65536` and `balanced-window-65536`, as `kv_quality.py --adapters RUNS` leaves
them. Methods whose adapter is not there are left out. Chunks of 16: a window looks worse in larger ones than it is in
a decode. Rows of separate runs meet in one results file, and a killed run goes on where it stopped.
"""

import json
import time
from functools import partial as bind
from pathlib import Path

import baselines
import torch
import typer
from kv_quality import Part, merged, numbers, questions, spread_windows, texts
from rich.console import Console

from nestling import kv
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

PAPER = {"sinks": 0, "window": 0, "exact_prompt": False}
METHODS: dict[str, tuple[str, dict]] = {  # name: folder of the adapter, options of its cache
    # Everything compressed from token 0, as in the paper.
    "pca-uniform": ("pca-65536", {"allocation": "uniform", **PAPER}),
    "paper": ("paper", {"allocation": "uniform", **PAPER}),
    "paper-greedy": ("paper-greedy", {"allocation": "greedy", **PAPER}),
    "paper-energy": ("paper", {"allocation": "energy", **PAPER}),
    "paper-blend": ("paper-blend", {"allocation": "blend", **PAPER}),
    "balanced-energy": ("balanced-65536", {"allocation": "energy", **PAPER}),
    "no-window": ("no-window", {"allocation": "energy", **PAPER}),
    # With 4 sinks and the most recent tokens exact.
    "balanced-window": ("balanced-window-65536", {"exact_prompt": False}),
    "default": ("default", {"exact_prompt": False}),
}


def candidates(lm, folder: Path, methods: list[str], budgets: list[float], context: int) -> list[Candidate]:
    found = []
    for name in methods:
        place, options = METHODS[name]
        if not (folder / place).is_dir():
            Console().print(f"{name} is left out: {place} is not there", style="yellow", markup=False)
            continue
        adapter = kv.KVAdapter.from_pretrained(folder / place)
        make = baselines.nested(lm, adapter, quantise=False, context=context, dtype=torch.bfloat16, **options)
        found += [Candidate(name, budget, bind(make, budget)) for budget in budgets]
    return found


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    adapters: Path = typer.Option(..., help="The folder of the adapters."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    methods: str = typer.Option(",".join(METHODS), help="What is measured."),
    budgets: str = typer.Option("1,0.875,0.75,0.625,0.5,0.4,0.375,0.25", help="Shares of the full cache."),
    windows: int = typer.Option(8, help="Windows of text, of 1,024 tokens."),
    rows: int = typer.Option(200, help="Questions a task."),
    chunk: int = typer.Option(16, help="Tokens that go through a cache at once."),
    only: Part = typer.Option(Part.both, help="KL and perplexity, or the tasks."),
    out: Path = typer.Option(Path("benchmarks/results/kv_paper.json"), help="Results; joined with what is there."),
):
    start, length = time.monotonic(), 1024
    lm, tokenizer = load_model(model)
    settings = {"model": Path(model).name, "length": length, "storage": "bf16"}
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"runs": []}}
    store = ResultStore(out.with_suffix(".partial.json"), settings)
    shares, chosen = numbers(budgets), methods.split(",")
    measure, config = bind(compare, lm, tokenizer, store=store), bind(EvalConfig, chunk=chunk, length=length)
    found, run = old["rows"], {"part": only.value, "chunk": chunk}
    if only != Part.tasks:
        ids = spread_windows(tokenizer, texts(data)[1], length, windows)
        run["windows"] = len(ids)
        entrants = candidates(lm, adapters, chosen, shares, length)
        found = merged(found, measure(ids, entrants, config(windows=len(ids))), METHODS)
    if only != Part.kl:
        run["rows"] = rows
        entrants = candidates(lm, adapters, chosen, shares, length)
        new = measure(None, entrants, config(windows=0, tasks=questions(data, rows)))
        found = merged(found, [{k: v for k, v in row.items() if not k.startswith("bytes_")} for row in new], METHODS)
    meta = run_meta(time.monotonic() - start)
    run |= {k: meta[k] for k in ("command", "date", "commit", "seconds")}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found, {**meta, "settings": settings, "runs": [*old["meta"]["runs"], run]})
    store.path.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 180)
    console.print(table([{k: v for k, v in row.items() if k != "model"} for row in found]))


if __name__ == "__main__":
    typer.run(main)
