"""Speed of decoding with nested caches: attention and whole steps at several context lengths, and the bytes they move.

    OMP_WAIT_POLICY=passive python benchmarks/kv_speed.py [--model smollm2] [--contexts 1024,4096,8192,16384]

Caches are filled with random keys and values, which cost as much to read as real ones. All methods of a context are
timed in turns, one step each (interleaved), and the medians are reported.

* `same-storage` is a nested cache at full rank: our storage without any compression, read by SDPA. What it gains over
  DynamicCache is the copy of the history that DynamicCache makes for every token.
* `same-storage-again` is the same thing a second time: how far two equal things are apart in this run.
* `nested-bits-X` has its coordinates quantised and packed; `-unpacked` keeps the same ones in bf16, and what the first
  takes over it is what reading packed codes costs.
* `same-attention` has a block of eight key coordinates less than full rank (one coordinate in results of before there
  were blocks), so that nearly all bytes are read by the attention in coordinates. What it gains over `same-storage` is
  that a KV head is read once for its whole group of query heads; what X gains over it is compression alone.
"""

import statistics
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from nestling import kv
from nestling.jobs.progress import progress_bar
from nestling.kv.evaluation.evaluate import held_bytes
from nestling.kv.integration.attach import attention_forward, cached, head_shape, text_config
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

FILL = 1024  # tokens that are filled in at once
REFERENCE = "same-storage"


def makers(lm, adapter: kv.KVAdapter, context: int, steps: int) -> dict:
    """Methods by name: functions that give an empty cache."""
    config = text_config(lm)

    def ranks(budget, **options) -> kv.NestedCache:
        options = {"context": 4096, "quantise": False, "dtype": lm.dtype, **options}
        return kv.NestedCache(lm, adapter, kv.CacheConfig(budget=budget, **options))

    found = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=context + 2 * steps + 8),
        "quanto-int4": lambda: QuantizedCache("quanto", config, nbits=4),
        REFERENCE: lambda: ranks(1.0),
        f"{REFERENCE}-again": lambda: ranks(1.0),
    }
    layers, heads, width = adapter.shape
    table = {side: [[rank] * heads] * layers for side, rank in (("keys", width - 8), ("values", width))}
    found["same-attention"] = lambda: ranks(table)
    for budget in (0.5, 0.25):
        for name in ("uniform", "energy"):
            found[f"nested-{name}-{budget:.0%}"] = lambda b=budget, a=name: ranks(b, allocation=a)
    found["nested-energy-50%-bf16"] = lambda: ranks(0.5, dtype=torch.bfloat16)
    for budget in (0.25, 0.125):
        bits = adapter.allocate(budget)
        unpacked = kv.Allocation(*(16 * (side > 0) for side in (bits.keys, bits.values)), width)
        found[f"nested-bits-{budget:.1%}"] = lambda t=bits: kv.NestedCache(lm, adapter, t)
        found[f"nested-bits-{budget:.1%}-unpacked"] = lambda t=unpacked: kv.NestedCache(lm, adapter, t)
    return found


def fill(lm, cache, tokens: int) -> None:
    """Put ``tokens`` random keys and values into every layer."""
    config = text_config(lm)
    _, heads, width = head_shape(config)
    for layer in range(config.num_hidden_layers):
        for part in torch.randn(2, 1, heads, tokens, width, dtype=lm.dtype, device=lm.device).split(FILL, 3):
            cache.update(part[0], part[1], layer)


def attention_step(lm, cache, modules) -> None:
    """One decode step's cache update and attention, in all layers, without the rest of the model."""
    config = text_config(lm)
    query_heads, heads, width = head_shape(config)
    new = torch.randn(2, 1, heads, 1, width, dtype=lm.dtype, device=lm.device)
    query = torch.randn(1, query_heads, 1, width, dtype=lm.dtype, device=lm.device)
    for layer, module in enumerate(modules):
        keys, values = cache.update(new[0], new[1], layer)
        mask = None
        if isinstance(cache, StaticCache):  # it attends to all of its slots, under a mask
            mask = (torch.arange(keys.shape[2], device=lm.device) < cache.get_seq_length(layer))[None, None, None]
        attention_forward(module, query, keys, values, mask, scaling=module.scaling)


def attention_modules(lm) -> list:
    found = {m.layer_idx: m for m in lm.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    return [found[i] for i in sorted(found)]


def timed(function, *args) -> float:
    """Milliseconds, to the end of what a GPU was given to do."""
    _wait()
    start = time.perf_counter()
    function(*args)
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def measure(lm, adapter, context: int, steps: int, advance) -> list[dict]:
    """Rows of one context, medians over ``steps`` interleaved steps."""
    caches = {name: make() for name, make in makers(lm, adapter, context, steps).items()}
    for name, cache in list(caches.items()):
        try:
            fill(lm, cache, context)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            Console().print(f"{name} does not run here: {error}", style="yellow", markup=False)
            del caches[name]
    token, modules = torch.zeros(1, 1, dtype=torch.long, device=lm.device), attention_modules(lm)
    times: dict[str, dict[str, list[float]]] = {name: {"attention": [], "decode": []} for name in caches}
    for step in range(steps + 2):  # two to warm up
        for name, cache in caches.items():
            seconds = timed(attention_step, lm, cache, modules), timed(lambda c: lm(token, **cached(lm, c)), cache)
            if step >= 2:
                times[name]["attention"].append(seconds[0])
                times[name]["decode"].append(seconds[1])
            advance()
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    embedding = lm.get_input_embeddings().weight
    if lm.get_output_embeddings() is not None and lm.get_output_embeddings().weight is not embedding:
        weights -= embedding.numel() * embedding.element_size()  # one row of it is read
    median = {n: {k: statistics.median(v) for k, v in t.items()} for n, t in times.items()}
    full = median[REFERENCE]
    return [
        {
            "model": Path(lm.config.name_or_path).name,
            "method": name,
            "context": context,
            "cache_mib": held_bytes(caches[name]) / 2**20,
            "attention_ms": m["attention"],
            "attention_gb_s": held_bytes(caches[name]) / m["attention"] / 1e6,
            "decode_ms": m["decode"],
            "decode_gb_s": (held_bytes(caches[name]) + weights) / m["decode"] / 1e6,
            "attention_same_storage_over_this": full["attention"] / m["attention"],
            "decode_same_storage_over_this": full["decode"] / m["decode"],
            "decode_dynamic_over_this": median["dynamic"]["decode"] / m["decode"],
        }
        for name, m in median.items()
    ]


def crossover(rows: list[dict], method: str) -> str:
    """From which measured context on a method decodes faster than the same storage at full rank."""
    faster = {r["context"]: r["decode_same_storage_over_this"] > 1 for r in rows if r["method"] == method}
    slower = [context for context, is_faster in faster.items() if not is_faster]
    start = [context for context in sorted(faster) if context > max(slower, default=0)]
    return f"from {start[0]} tokens on" if start else f"not up to {max(faster)} tokens"


def main(
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    adapter: Path | None = typer.Option(None, help="An adapter; by default a short calibration on built-in text."),
    contexts: str = typer.Option("1024,4096,8192,16384", help="Tokens in the cache."),
    steps: int = typer.Option(20, help="Timed steps per method and context."),
    threads: int = typer.Option(2, help="Threads of torch."),
    out: Path = typer.Option(Path("benchmarks/results/kv_speed.json")),
):
    torch.set_num_threads(threads)
    start = time.monotonic()
    lm, tokenizer = load_model(model)
    if adapter is None:
        from nestling.data.texts import read_texts

        nested = kv.fit(lm, tokenizer, read_texts(None), kv.FitConfig(tokens=8192, sensitivity_windows=8))
    else:
        nested = kv.KVAdapter.from_pretrained(adapter)
    lengths = [int(c) for c in contexts.split(",")]
    rows = []
    with progress_bar() as bar:
        for context in lengths:
            count = len(makers(lm, nested, context, steps)) * (steps + 2)
            task = bar.add_task(f"{context} tokens", total=count)
            rows += measure(lm, nested, context, steps, lambda t=task: bar.advance(t))
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    per_token = nested.full_elements * lm.dtype.itemsize
    summary = {
        "weights_mib": weights / 2**20,
        "full_cache_bytes_per_token": per_token,
        "cache_equals_weights_at_tokens": round(weights / per_token),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "steps": steps,
    }
    summary |= {f"crossover {m}": crossover(rows, m) for m in {r["method"] for r in rows} if m.startswith("nested")}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, {**run_meta(time.monotonic() - start), **summary})
    console = Console()
    console.width = max(console.width, 180)
    console.print(table([{k: v for k, v in r.items() if k != "model"} for r in rows], title=f"{model}, medians"))
    for name, value in summary.items():
        console.print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
