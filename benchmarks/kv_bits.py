"""Ranks and bits together, beside plain integers, at the bytes that are really held: KL, perplexity, tasks, recall.

    python benchmarks/kv_bits.py --data FOLDER [--only kl|tasks] [--length 4096]
    python benchmarks/kv_bits.py --data FOLDER --only tasks --rows 0 --passkey 1000
    python benchmarks/kv_bits.py --data FOLDER --model gemma3 --methods bits-balanced,bits-pca,int4,kivi-int2

`bits` and `ranks` are of the trained adapter, and `bits-NAME` and `ranks-NAME` of another one (`--adapter`, `--name`);
`bits-auto` (the default bases), `bits-balanced` and `bits-pca` of ones that are calibrated here, on the Brown corpus.
Ours keep 4 sinks and recent tokens at 8 bits or in bf16, which are counted: as many as caches keep by default, or, as
`--name window-64 --window 64` has it, as many as integers keep. Budgets are met at the length of the windows, and left
out where ranks cannot meet them. Plain integers have the bytes that their groups and scales take; `quanto` and `hqq`
are transformers' QuantizedCache.
"""

import json
import time
from collections.abc import Callable
from functools import partial as bind
from pathlib import Path

import baselines
import torch
import typer
from kv_quality import Part, fit, merged, numbers, of_bf16, questions, spread_windows, texts
from rich.console import Console

from nestling import kv
from nestling.errors import BudgetError
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.kv.integration.attach import text_config
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

CALIBRATED = {  # method: basis, as `fit` names it
    "bits-auto": "auto-window",
    "bits-balanced": "balanced-window",
    "bits-pca": "pca-window",
}
BASELINES = {
    **{f"int{b}": bind(baselines.int_cache, bits=b) for b in (8, 4, 3, 2)},
    **{f"hadamard-int{b}": bind(baselines.int_cache, bits=b, rotate=True) for b in (4, 3, 2)},
    **{f"kivi-int{b}": bind(baselines.kivi_cache, bits=b) for b in (4, 3, 2)},
    **{f"quanto-int{b}": bind(baselines.quanto_cache, bits=b) for b in (4, 2)},
    **{f"hqq-int{b}": bind(baselines.hqq_cache, bits=b) for b in (4, 2)},
}
METHODS = ["bits", *CALIBRATED, "ranks", *BASELINES]


def candidates(
    lm, adapter: Callable[[str], kv.KVAdapter], methods: list[str], shares: list[float], context: int,
    window: int | None, behind: str = "",
) -> list:  # fmt: skip
    """Methods at each share; ``adapter`` gives those of ours, and ``behind`` is put behind the trained one's names."""
    found = []
    for name in methods:
        if name in BASELINES:
            found.append(Candidate(name, None, bind(BASELINES[name], text_config(lm))))
            continue
        options = {"context": context, "window": window, "exact_prompt": False, "dtype": torch.bfloat16}
        make = baselines.nested(lm, adapter(name), quantise=name != "ranks", **options)
        label = name if name in CALIBRATED else name + behind
        found += [Candidate(label, share, bind(make, share)) for share in shares if _reachable(make, share)]
    return found


def _reachable(make: Callable, share: float) -> bool:
    """Ranks have a least one, and exact tokens take their part: some shares cannot be had."""
    try:
        make(share)
    except BudgetError:
        return False
    return True


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    adapter: str = typer.Option("smollm2", help="The trained adapter: folder, hub id or alias."),
    name: str = typer.Option("", help="Of that adapter, in the results: bits-NAME, ranks-NAME."),
    adapters: Path | None = typer.Option(None, help="Folder that keeps calibrations for the next time."),
    tokens: int = typer.Option(65536, help="Tokens to calibrate on."),
    methods: str = typer.Option(",".join(METHODS), help="What is measured."),
    budgets: str = typer.Option("0.3125,0.25,0.1875,0.125,0.09375,0.0625", help="Shares of the full cache."),
    windows: int = typer.Option(3, help="Windows of text."),
    length: int = typer.Option(4096, help="Tokens a window."),
    window: int | None = typer.Option(None, help="Recent tokens that ours keep exact; default: by the budget."),
    rows: int = typer.Option(100, help="Questions a task; 0 for none."),
    passkey: str = typer.Option("", help="Prompt lengths for hidden passkeys, with the tasks."),
    chunk: int = typer.Option(64, help="Tokens that go through a cache at once."),
    only: Part = typer.Option(Part.kl, help="KL and perplexity, or tasks and recall."),
    out: Path = typer.Option(Path("benchmarks/results/kv_bits.json"), help="Results; joined with what is there."),
):
    start, chosen = time.monotonic(), methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        raise typer.BadParameter(f"unknown methods {sorted(unknown)}; known: {', '.join(METHODS)}")
    lm, tokenizer = load_model(model)
    settings = {"length": length, "window": window, "storage": "bf16"}
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"runs": []}}
    store = ResultStore(out.with_suffix(".partial.json"), {**settings, "model": Path(model).name})
    found, run = old["rows"], {"part": only.value, "chunk": chunk, **settings}
    calibration, documents = texts(data)

    def adapter_of(method: str) -> kv.KVAdapter:
        if method in CALIBRATED:
            return fit(lm, tokenizer, CALIBRATED[method], calibration, tokens, adapters)
        return kv.KVAdapter.from_pretrained(adapter)

    entrants = candidates(lm, adapter_of, chosen, numbers(budgets), length, window, f"-{name}" * bool(name))
    config = bind(EvalConfig, chunk=chunk, length=length)
    measure = bind(compare, lm, tokenizer, candidates=entrants, store=store)
    if only != Part.tasks:
        ids = spread_windows(tokenizer, documents, length, windows)
        run["windows"] = len(ids)
        found = merged(found, measure(texts=ids, config=config(windows=len(ids))), METHODS)
    if only != Part.kl:
        run |= {"rows": rows, "passkey": [int(n) for n in numbers(passkey)]}
        tasks = questions(data, rows) if rows else {}
        new = measure(texts=None, config=config(windows=0, tasks=tasks, passkey=run["passkey"]))
        found = merged(found, [{k: v for k, v in row.items() if not k.startswith("bytes_")} for row in new], METHODS)
    of_bf16(found)
    meta = run_meta(time.monotonic() - start)
    run |= {k: meta[k] for k in ("command", "date", "commit", "seconds")}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found, {**meta, "runs": [*old["meta"]["runs"], run]})
    store.path.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table([{k: v for k, v in row.items() if k != "model"} for row in found]))


if __name__ == "__main__":
    typer.run(main)
