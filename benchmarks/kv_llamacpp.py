"""Nested caches beside llama.cpp's quantised ones: bytes, KL and decode speed, on the same weights and one thread.

    CMAKE_BUILD_PARALLEL_LEVEL=2 pip install --no-binary llama-cpp-python llama-cpp-python
    OMP_WAIT_POLICY=passive python benchmarks/kv_llamacpp.py --data FOLDER

Both engines hold the model in fp32; that their logits agree is checked first. KL is to the full fp32 cache of the same
engine, on windows of kv_cost.py. Speed is that of single tokens on random histories: all caches take turns, and the
medians are reported. The engines multiply matrices in different ways, so what compares caches is the speed over the
fastest full cache of the same engine.
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
from llamacpp import TYPES, Context, Model, system
from rich.console import Console
from timing import medians
from torch import Tensor
from transformers import DynamicCache, StaticCache

from nestling import kv
from nestling.files.writing import version_of
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare, held_bytes
from nestling.kv.evaluation.loss import loss_columns
from nestling.kv.integration.attach import cached, text_config
from nestling.losses import kl_divergence
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

REFERENCE = "f32"
AGREE = 0.01  # how far a logit of llama.cpp may lie from transformers'
LLAMA = {kind: f"llamacpp-{kind}" for kind in TYPES}  # names of its caches in results
FULL = ("dynamic", "static", LLAMA["f32"], LLAMA["f16"])
COLUMNS = ("method", "budget", "bytes_share", "kl", "kl_99", "top1")


def logits(model: Model, kind: str, ids: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Of every token of a window ``[T]``, and the bytes held at its end."""
    with closing(Context(model, kind, len(ids), chunk)) as context:
        return torch.cat([context.read(part.tolist()) for part in ids.split(chunk)]), context.held()


def difference(model: Model, lm, ids: Tensor, chunk: int) -> float:
    """The largest between logits of both engines with full caches, on a window ``[T]``.

    Raises:
        RuntimeError: it is above `AGREE`.
    """
    ours = lm(ids[None], use_cache=False).logits[0]
    largest = float((ours - logits(model, REFERENCE, ids, chunk)[0]).abs().max())
    if largest > AGREE:
        raise RuntimeError(f"logits of llama.cpp differ by {largest:.3g} from transformers': {AGREE} is allowed")
    return largest


def losses(model: Model, windows: Tensor, chunk: int, bf16: int) -> list[dict]:
    """A row for each type of llama.cpp's caches, on windows ``[n, T]``; ``bf16``: bytes of a token in a full one."""
    kl: dict[str, list[Tensor]] = {kind: [] for kind in LLAMA}
    hits, held = dict.fromkeys(LLAMA, 0), dict.fromkeys(LLAMA, 0)
    for window in windows:
        expected, _ = logits(model, REFERENCE, window, chunk)
        for kind in LLAMA:
            read, held[kind] = logits(model, kind, window, chunk)
            kl[kind].append(kl_divergence(expected, read))
            hits[kind] += int((read.argmax(-1) == expected.argmax(-1)).sum())
    rows = []
    for kind, method in LLAMA.items():
        row = {"method": method, "budget": None, "bytes_share": held[kind] / bf16 / windows.shape[1]}
        row |= loss_columns(torch.stack(kl[kind])) | {"top1": hits[kind] / windows.numel()}
        rows.append(row)
    return rows


def nested(lm, adapter: kv.KVAdapter, share: float, context: int) -> kv.NestedCache:
    options = {"context": context, "exact_prompt": False, "dtype": torch.bfloat16}
    return kv.NestedCache(lm, adapter, kv.CacheConfig(budget=share, **options))


def step(lm, cache) -> None:
    lm(torch.zeros(1, 1, dtype=torch.long), **cached(lm, cache))


@torch.inference_mode()
def speeds(lm, adapter, shares: list[float], contexts: dict[str, Context], length: int, steps: int) -> dict:
    """By method and budget: tokens a second up to a length of ``length``, and the MiB held there."""
    config, old = text_config(lm), length - steps - 1  # one step does not count
    caches = {("dynamic", None): DynamicCache(config=config)}
    caches["static", None] = StaticCache(config=config, max_cache_len=length)
    caches |= {("bits", share): nested(lm, adapter, share, length) for share in shares}
    jobs = {key: bind(step, lm, cache) for key, cache in caches.items()}
    for cache in caches.values():
        fill(lm, cache, old)
    for kind, context in contexts.items():
        context.fill(old)
        jobs[LLAMA[kind], None] = bind(context.read, [0])
    seconds = medians(jobs, steps)
    held = {key: held_bytes(cache) for key, cache in caches.items()}
    held |= {(LLAMA[kind], None): context.held() for kind, context in contexts.items()}
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
    with TemporaryDirectory() as folder:
        write_gguf(lm, file := Path(folder) / "model.gguf")
        llama = Model(file)
        apart = difference(llama, lm, ids[0], chunk)
        theirs = losses(llama, ids, chunk, 2 * bases.full_elements)
        full, *ours = compare(lm, tokenizer, ids, entrants, EvalConfig(windows=len(ids), length=length, chunk=chunk))
        rows = [*theirs, *(full | {"method": name} for name in ("dynamic", "static")), *ours]
        rows = [{"engine": engine(row["method"])} | {key: row[key] for key in COLUMNS} for row in rows]
        opened = {kind: Context(llama, kind, lengths[-1], chunk) for kind in LLAMA}
        for n in lengths:
            add_speeds(rows, speeds(lm, bases, shares, opened, n, steps), n)
        for context in opened.values():
            context.close()
        llama.close()
    meta = run_meta(time.monotonic() - start)
    meta["versions"] |= {name: version_of(name) for name in ("llama-cpp-python", "gguf")}
    meta |= {"model": Path(model).name, "dtype": "float32", "length": length, "windows": len(ids), "chunk": chunk}
    meta |= {"steps": steps, "llamacpp": system(), "largest_logit_difference": apart}
    meta["shared_bases_mib"] = {share: nested(lm, bases, share, length).shared_nbytes / 2**20 for share in shares}
    write_json(out, rows, meta)
    console = Console()
    console.width = max(console.width, 180)
    console.print(table(rows, title=f"{model}, {length:,} tokens, logits apart by {apart:.2g}"))


if __name__ == "__main__":
    typer.run(main)
