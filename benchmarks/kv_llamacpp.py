"""Nested caches beside llama.cpp's quantised ones: bytes, KL and decode speed, on the same weights and one thread.

    CMAKE_BUILD_PARALLEL_LEVEL=2 pip install --no-binary llama-cpp-python llama-cpp-python
    OMP_WAIT_POLICY=passive python benchmarks/kv_llamacpp.py --data FOLDER

Both engines hold the model in fp32; that their logits agree is checked first. KL is to the full fp32 cache of the same
engine, on windows of kv_cost.py. Speed is that of single tokens on random histories: all caches take turns, and the
medians of their processor's seconds are reported, so that other load does not count. The engines multiply matrices in
different ways, so what compares caches is the speed over the fastest full cache of the same engine. A killed run goes
on where it stopped.
"""

import time
from contextlib import closing
from functools import partial as bind
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer
from gguf_file import write_gguf
from kv_quality import numbers, spread_windows, texts
from kv_speed import fill
from llamacpp import KINDS, VERSION, Context, Model, system
from rich.console import Console
from timing import medians
from torch import Tensor
from transformers import DynamicCache, StaticCache

from nestling import kv
from nestling.files.writing import version_of
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare, held_bytes
from nestling.kv.evaluation.loss import loss_columns
from nestling.kv.integration.attach import cached, text_config
from nestling.losses import kl_divergence
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

REFERENCE = "f32"
PIECE = 64  # tokens that llama.cpp's histories are copies of, where speed is measured
AGREE = 0.01  # how far a logit of llama.cpp may lie from transformers'
LLAMA = {kind: f"llamacpp-{kind}" for kind in KINDS}  # names of its caches in results
FULL = ("dynamic", "static", LLAMA["f32"], LLAMA["f16-plain"], LLAMA["f16"])
COLUMNS = ("method", "budget", "bytes_per_token", "kl", "kl_99", "top1")


def read(model: Model, kind: str, ids: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Logits of every token of a window ``[T]``, and the bytes held at its end."""
    with closing(Context(model, kind, len(ids), chunk)) as context:
        return torch.cat([context.read(part.tolist()) for part in ids.split(chunk)]), context.held()


@torch.inference_mode()
def window_losses(model: Model, lm, ids: Tensor, chunk: int) -> dict[str, list[float]]:
    """By llama.cpp's caches, of a window ``[T]``: bytes held, tokens with `REFERENCE`'s first choice, and the KL of
    each token; of `REFERENCE` itself the largest difference of a logit from transformers' and nothing else.

    Raises:
        RuntimeError: that difference is above `AGREE`.
    """
    expected, _ = read(model, REFERENCE, ids, chunk)
    apart = float((lm(ids[None], use_cache=False).logits[0] - expected).abs().max())
    if apart > AGREE:
        raise RuntimeError(f"logits of llama.cpp differ by {apart:.3g} from transformers': {AGREE} is allowed")
    found = {REFERENCE: [apart]}
    for kind in KINDS[1:]:
        logits, held = read(model, kind, ids, chunk)
        hits = int((logits.argmax(-1) == expected.argmax(-1)).sum())
        found[kind] = [held, hits, *kl_divergence(expected, logits).tolist()]
    return found


def losses(model: Model, lm, windows: Tensor, chunk: int, store: ResultStore) -> tuple[list[dict], float]:
    """A row for each of llama.cpp's caches but `REFERENCE`, on windows ``[n, T]``, and how far engines are apart."""
    for number, ids in enumerate(windows):
        if f"llama.cpp, window {number}" not in store.done:
            store.done[f"llama.cpp, window {number}"] = window_losses(model, lm, ids, chunk)
            store.save()
    found = [store.done[f"llama.cpp, window {number}"] for number in range(len(windows))]
    rows = []
    for kind in KINDS[1:]:
        measured = torch.tensor([window[kind] for window in found], dtype=torch.float64)
        row = {"method": LLAMA[kind], "budget": None, "top1": float(measured[:, 1].sum()) / windows.numel()}
        rows.append(
            row | loss_columns(measured[:, 2:]) | {"bytes_per_token": float(measured[0, 0]) / windows.shape[1]}
        )
    return rows, max(window[REFERENCE][0] for window in found)


def nested(lm, adapter: kv.KVAdapter, share: float, context: int) -> kv.NestedCache:
    options = {"context": context, "exact_prompt": False, "dtype": torch.bfloat16}
    return kv.NestedCache(lm, adapter, kv.CacheConfig(budget=share, **options))


def step(lm, cache) -> None:
    lm(torch.zeros(1, 1, dtype=torch.long), **cached(lm, cache))


@torch.inference_mode()
def speeds(lm, adapter, shares: list[float], llama: Model, length: int, steps: int) -> dict:
    """By method and budget: tokens a second up to a length of ``length``, and the MiB held there."""
    config, old = text_config(lm), length - steps - 1  # one step does not count
    caches = {("dynamic", None): DynamicCache(config=config)}
    caches["static", None] = StaticCache(config=config, max_cache_len=length)
    caches |= {("bits", share): nested(lm, adapter, share, length) for share in shares}
    jobs = {key: bind(step, lm, cache) for key, cache in caches.items()}
    for cache in caches.values():
        fill(lm, cache, old)
    contexts = {(LLAMA[kind], None): Context(llama, kind, length, PIECE, 1 + length // PIECE) for kind in KINDS}
    for key, context in contexts.items():
        context.fill(old)
        jobs[key] = bind(context.read, [0])
    seconds = medians(jobs, steps, time.process_time)
    held = {key: held_bytes(cache) for key, cache in caches.items()}
    held |= {key: context.held() for key, context in contexts.items()}
    for context in contexts.values():
        context.close()
    return {key: (1 / seconds[key], held[key] / 2**20) for key in jobs}


def engine(method: str) -> str:
    return "llama.cpp" if method in LLAMA.values() else "transformers"


def add_speeds(rows: list[dict], measured: dict, length: int) -> None:
    """What `speeds` measured, and the speed over the fastest full cache of the same engine."""
    for row in rows:
        full = [
            speed for (method, _), (speed, _) in measured.items() if method in FULL and engine(method) == row["engine"]
        ]
        speed, mib = measured[row["method"], row["budget"]]
        row |= {f"tokens_per_s_{length}": speed, f"over_full_{length}": speed / max(full), f"mib_{length}": mib}


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id, of the llama family."),
    adapter: str = typer.Option("smollm2", help="Folder, hub id or alias."),
    budgets: str = typer.Option("0.5,0.25,0.125", help="Shares of the full cache."),
    length: int = typer.Option(2048, help="Tokens of a window."),
    windows: int = typer.Option(2, help="Windows of text."),
    contexts: str = typer.Option("2048,8192", help="Tokens in the cache whose speed is measured."),
    steps: int = typer.Option(20, help="Timed steps per cache and context."),
    chunk: int = typer.Option(256, help="Tokens that are read at once."),
    out: Path = typer.Option(Path("benchmarks/results/kv_llamacpp.json")),
):
    torch.set_num_threads(1)
    start, shares, lengths = time.monotonic(), numbers(budgets), sorted(map(int, numbers(contexts)))
    lm, tokenizer = load_model(model, torch.float32)
    bases = kv.KVAdapter.from_pretrained(adapter)
    ids = spread_windows(tokenizer, texts(data)[1], length, windows)
    entrants = [Candidate("bits", share, bind(nested, lm, bases, share, length)) for share in shares]
    out.parent.mkdir(parents=True, exist_ok=True)
    job = {"model": Path(model).name, "length": length, "windows": len(ids), "chunk": chunk}
    store = ResultStore(out.with_suffix(".partial.json"), job)
    with TemporaryDirectory() as folder:
        write_gguf(lm, file := Path(folder) / "model.gguf")
        llama = Model(file)
        theirs, apart = losses(llama, lm, ids, chunk, store)
        config = EvalConfig(windows=len(ids), length=length, chunk=chunk)
        full, *ours = compare(lm, tokenizer, ids, entrants, config, store=store)
        rows = [*(full | {"method": name} for name in (LLAMA[REFERENCE], "dynamic", "static")), *theirs, *ours]
        bf16 = 2 * bases.full_elements
        rows = [{"engine": engine(row["method"])} | {key: row[key] for key in COLUMNS} for row in rows]
        rows = [row | {"bytes_share": row.pop("bytes_per_token") / bf16} for row in rows]
        rows.sort(key=lambda row: row["engine"])
        for n in lengths:
            add_speeds(rows, speeds(lm, bases, shares, llama, n, steps), n)
        llama.close()
    meta = run_meta(time.monotonic() - start)
    meta["versions"] |= {"llama-cpp-python": VERSION, "gguf": version_of("gguf")}
    meta |= {**job, "dtype": "float32", "steps": steps, "llamacpp": system(), "largest_logit_difference": apart}
    meta["shared_bases_mib"] = {share: nested(lm, bases, share, length).shared_nbytes / 2**20 for share in shares}
    write_json(out, rows, meta)
    store.path.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 180)
    console.print(table(rows, title=f"{model}, {length:,} tokens, logits apart by {apart:.2g}"))


if __name__ == "__main__":
    typer.run(main)
