"""vLLM with a nested cache beside stock vLLM: room, likelihood of a text, and time of the same concurrent requests.

    python benchmarks/vllm_cache.py --model FOLDER --texts wikitext2_valid.txt.gz [--budgets 50%] [--runs 3]

It runs where vLLM is installed, see docs/vllm.md. All engines live in one process, with one thread and bf16; they take
turns, a run each, and the medians of their seconds are reported: of whole runs, and of attention alone, which is
writing keys and values to the cache and reading them. Seconds are those of the processor, so that other load does not
count. Prefix caching is off, so every run reads everything.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
)

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from nestling.data.texts import read_texts  # noqa: E402
from nestling.integrations.vllm.config import PluginConfig, cache_config  # noqa: E402
from nestling.jobs.progress import progress_bar  # noqa: E402
from nestling.kv.adapter import KVAdapter  # noqa: E402
from nestling.kv.cache.factory import CacheFactory  # noqa: E402
from nestling.report.results import run_meta, write_json  # noqa: E402
from nestling.report.tables import table  # noqa: E402

LENGTH, CHUNK, BLOCK = 2048, 256, 64  # tokens of a request at most, that are read at once, of a block
STOCK = "stock"


def start(model: str, adapter: str, budget: str) -> Any:
    """An engine: stock, or with a nested cache of a budget."""
    from vllm import LLM

    config = {"additional_config": {"nestling": {"adapter": adapter, "budget": budget}}} if budget != STOCK else {}
    return LLM(
        model=model, dtype="bfloat16", enforce_eager=True, max_model_len=LENGTH, max_num_batched_tokens=CHUNK,
        block_size=BLOCK, max_num_seqs=16, enable_prefix_caching=False,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor", **config,
    )  # fmt: skip


class Clock:
    """Seconds that an engine's attention takes, all layers together."""

    def __init__(self, llm: Any):
        self.seconds = 0.0
        for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
            if hasattr(layer, "impl"):
                for name in ("do_kv_cache_update", "forward"):
                    setattr(layer.impl, name, self.timed(getattr(layer.impl, name)))

    def timed(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            before = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - before

        return call


def seconds(llm: Any, clock: Clock, texts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Of all requests at once, with so many new tokens each: of the run, and of its attention."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    clock.seconds, before = 0.0, time.process_time()
    llm.generate([{"prompt_token_ids": ids} for ids in texts], options, use_tqdm=False)
    return time.process_time() - before, clock.seconds


def likelihood(llm: Any, texts: list[list[int]]) -> float:
    """Negative log-likelihood in nats per token."""
    from vllm import SamplingParams

    total, count = 0.0, 0
    for ids in texts:
        options = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (out,) = llm.generate([{"prompt_token_ids": ids}], options, use_tqdm=False)
        total -= sum(row[token].logprob for row, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True))
        count += len(ids) - 1
    return total / count


def main(
    model: str = typer.Option(..., help="Folder of the model."),
    texts: Path = typer.Option(..., help="A text to score and to make requests of."),
    adapter: str = typer.Option("smollm2"),
    budgets: str = typer.Option("50%", help="Shares; the smallest that can be is added to them."),
    requests: int = typer.Option(12, help="At once."),
    prompt: int = typer.Option(800, help="Tokens of each."),
    tokens: int = typer.Option(8, help="New ones of each."),
    windows: int = typer.Option(1, help="Of a text of 1,500 tokens, that are scored."),
    runs: int = typer.Option(3),
    out: Path = typer.Option(Path("benchmarks/results/vllm_cache.json")),
):
    begun = time.monotonic()
    torch.set_num_threads(1)
    options = cache_config(PluginConfig(adapter=adapter), LENGTH)
    least = CacheFactory(KVAdapter.from_pretrained(adapter), options, advise=False).smallest
    engines = {name: start(model, adapter, name) for name in (STOCK, *budgets.split(","), f"{100 * least:.4g}%")}
    ids = engines[STOCK].get_tokenizer()("\n".join(read_texts(texts)))["input_ids"]
    scored = [ids[i * 1500 : (i + 1) * 1500] for i in range(windows)]
    rest = ids[windows * 1500 :]
    asked = [rest[i * prompt : (i + 1) * prompt] for i in range(requests)]
    clocks = {name: Clock(llm) for name, llm in engines.items()}
    nll = {name: likelihood(llm, scored) for name, llm in engines.items()}  # and what is only done once
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    with progress_bar() as bar:
        for done in bar.track(range(1, runs + 1), description="runs"):
            for name, llm in engines.items():
                times[name].append(seconds(llm, clocks[name], asked, tokens))
            asking = {"requests": requests, "prompt": prompt, "tokens": tokens, "runs": done}
            rows = [row_of(name, llm, nll[name], times) for name, llm in engines.items()]
            write_json(out, rows, run_meta(time.monotonic() - begun) | asking)
    Console().print(table(rows))


def row_of(name: str, llm: Any, nll: float, times: dict[str, list[tuple[float, float]]]) -> dict:
    """What is reported of an engine."""
    medians = {key: [statistics.median(part) for part in zip(*runs, strict=True)] for key, runs in times.items()}
    row = {"model": Path(llm.llm_engine.vllm_config.model_config.model).name, "budget": name, "nll": nll}
    row["tokens"] = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    for place, part in enumerate(("seconds", "attention_seconds")):
        row[part] = medians[name][place]
        row[f"{part}_over_stock"] = medians[name][place] / medians[STOCK][place]
    return row


if __name__ == "__main__":
    typer.run(main)
