"""How long a decode is held up while its cache is made smaller, in decode steps of that cache (target: at most 3).

    OMP_WAIT_POLICY=passive python benchmarks/kv_shrink.py [--contexts 2048,8192] [--threads 1]

Caches are filled with random keys and values. Each turn takes a step with a cache, and shrinks a copy of it; medians
are reported. `shrink` is `NestedCache.shrink`; `limit` is a whole step that finds no room under the cache's limit in
bytes, so that a smaller budget is looked for and taken before the token is: what it takes above a step is the stall.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
import typer
from kv_speed import fill, timed
from rich.console import Console

from nestling import kv
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

CHANGES = {
    "bits": ((1.0, 0.25), (0.5, 0.25), (0.5, 0.45), (0.25, 0.125)),
    "ranks": ((1.0, 0.5), (0.5, 0.25), (0.5, 0.45)),
}


@torch.inference_mode()
def measure(lm, adapter: kv.KVAdapter, context: int, kind: str, start: float, end: float, turns: int) -> list[dict]:
    """Rows of one change of budget: asked for, and taken for want of room."""
    cache = kv.NestedCache(lm, adapter, kv.CacheConfig(budget=start, quantise=kind == "bits", context=4096))
    fill(lm, cache, context)
    token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    lm(token, past_key_values=cache)
    times: dict[str, list[float]] = {"step": [], "shrink": [], "limit": []}
    for turn in range(turns + 1):  # one to warm up
        asked, full = copy.deepcopy(cache), copy.deepcopy(cache)
        full.limit = cache.nbytes - 1
        found = {
            "step": timed(lambda: lm(token, past_key_values=cache)),
            "shrink": timed(asked.shrink, end),
            "limit": timed(lambda full=full: lm(token, past_key_values=full)),
        }
        for name, milliseconds in found.items() if turn else ():
            times[name].append(milliseconds)
        cache.crop(-1)
    median = {name: statistics.median(values) for name, values in times.items()}
    stalls = {"shrink": median["shrink"], "limit": median["limit"] - median["step"]}
    return [
        {
            "model": Path(lm.config.name_or_path).name,
            "method": f"{kind}-{name}",
            "context": context,
            "budget": start,
            "to": end if name == "shrink" else full.budget,
            "step_ms": median["step"],
            "stall_ms": stall,
            "stall_in_steps": stall / median["step"],
        }
        for name, stall in stalls.items()
    ]


def main(
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    adapter: str = typer.Option("smollm2", help="Alias or folder of an adapter."),
    contexts: str = typer.Option("2048,8192", help="Tokens in the cache."),
    turns: int = typer.Option(9, help="Timed turns."),
    threads: int = typer.Option(1, help="Threads of torch."),
    out: Path = typer.Option(Path("benchmarks/results/kv_shrink.json")),
):
    torch.set_num_threads(threads)
    began = time.monotonic()
    lm, _ = load_model(model)
    nested, rows = kv.KVAdapter.from_pretrained(adapter), []
    for context in map(int, contexts.split(",")):
        for kind, changes in CHANGES.items():
            for start, end in changes:
                rows += measure(lm, nested, context, kind, start, end, turns)
                Console().print(rows[-2], rows[-1], markup=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, run_meta(time.monotonic() - began))
    Console(width=160).print(table(rows, title=f"{model}, medians of {turns}, {threads} threads"))


if __name__ == "__main__":
    typer.run(main)
