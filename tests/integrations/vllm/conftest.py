"""A tiny model with its adapter in a folder, and engines of vLLM in this process."""

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling import kv

from ...kv.families import BASE, tiny_fit, tiny_model
from ..serve.conftest import chat_tokenizer

INSTALLED = find_spec("vllm") is not None
# Of the engines: one process, one thread, one GiB of cache, which is the least. Those of a server have them too.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
)
WINDOW, LENGTH, CHUNK, BLOCK = 24, 512, 64, 32
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass
class Tiny:
    """A random Llama of four layers in a folder, its adapter, and texts as ids."""

    folder: Path
    model: Any
    adapter: kv.KVAdapter

    @property
    def adapter_folder(self) -> str:
        return str(self.folder / "adapter")

    def texts(self, *lengths: int, seed: int = 0) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(3, BASE["vocab_size"] - 4) for _ in range(length)] for length in lengths]

    def nested(self, budget: Any) -> dict:
        """Options of an engine with a nested cache."""
        return {
            "additional_config": {"nestling": {"adapter": self.adapter_folder, "budget": budget, "window": WINDOW}}
        }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("vllm")
    model = tiny_model("llama-gqa", num_hidden_layers=4, head_dim=32, max_position_embeddings=2048)
    ids = torch.randint(3, BASE["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(0))
    adapter = tiny_fit(model, ids)
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    adapter.save_pretrained(folder / "adapter")
    return Tiny(folder, model, adapter)


@contextmanager
def engine(tiny: Tiny, **options: Any) -> Iterator[Any]:
    """vLLM's ``LLM`` of the tiny model in this process, for a block."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    usual = dict(
        model=str(tiny.folder), dtype="float32", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=8,
        max_num_batched_tokens=CHUNK, block_size=BLOCK, distributed_executor_backend=ONE_PROCESS,
        disable_log_stats=False,
    )  # fmt: skip
    llm = LLM(**usual | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass
class Answers:
    """What an engine wrote, and how many tokens of each prompt it had already."""

    ids: list[list[int]]
    cached: list[int]


def write(llm: Any, texts: list[list[int]], count: int = 24) -> Answers:
    """Greedy texts, all requests at once."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in texts], options, use_tqdm=False)
    return Answers([list(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens for out in outs])


def likelihoods(llm: Any, ids: list[int]) -> torch.Tensor:
    """Log-likelihood of every token of a text but the first."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (out,) = llm.generate([{"prompt_token_ids": ids}], options, use_tqdm=False)
    return torch.tensor([row[token].logprob for row, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)])


def metric(llm: Any, name: str) -> float:
    """Of vLLM's own counters, the sum of those whose names hold that."""
    return sum(entry.value for entry in llm.get_metrics() if name in entry.name and hasattr(entry, "value"))
