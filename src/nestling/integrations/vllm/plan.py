"""What an engine's layers store: from its configuration to an allocation, bases and block sizes, checked at start."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nestling.errors import KernelError, OptionError, UnsupportedModelError
from nestling.integrations.vllm.config import PluginConfig, cache_config
from nestling.integrations.vllm.kernels import compiled
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.bases import LayerBases, shared
from nestling.kv.cache.factory import planned
from nestling.kv.cache.storage import members
from nestling.kv.cache.window import TOKENS_PER_BLOCK

VECTOR = 16  # tokens: block sizes are multiples of it, since the kernels read as many at once


@dataclass(frozen=True, eq=False)
class Plan:
    """What the layers of an engine store.

    Attributes:
        adapter: whose bases they are.
        allocation: one rank a layer.
        sinks, window: tokens that are exact, at least.
        max_model_len: tokens of a request at which the budget is met.
    """

    adapter: KVAdapter
    allocation: Allocation
    sinks: int
    window: int
    max_model_len: int

    @property
    def ranks(self) -> list[int]:
        """Of every layer."""
        return self.allocation.coordinates[0, :, 0].tolist()

    @property
    def reach(self) -> int:
        """Recent tokens that may be exact: tokens leave the window a block at a time."""
        return self.window + TOKENS_PER_BLOCK - 1

    def bases(self, row: int, dtype: torch.dtype) -> LayerBases | None:
        """Those of a layer; None where nothing of it is compressed."""
        if self.allocation.full[row]:
            return None
        kept = members(self.allocation, row)
        return shared(self.adapter, row, kept, torch.device("cpu"), dtype.itemsize == 2)

    def exact_block_size(self, block_size: int, chunk: int) -> int:
        """Tokens in a block of exact ones: of the divisors of ``block_size`` the one by which a request of the
        greatest length takes the fewest bytes.

        All blocks of an engine have one size. vLLM shares the exact layers out over as many groups as it takes for a
        block of each to fit into that of the coordinates, and every group has blocks of its own.

        Args:
            block_size: tokens in a block of coordinates.
            chunk: tokens that are read at once, all of which are exact until they have been.
        """
        width, layers = self.adapter.shape[2], len(self.ranks) - sum(self.allocation.full)
        coordinates = block_size * sum(self.ranks)  # of a token's keys or values in a block, of one head
        tokens = min(self.reach - 1 + chunk, self.max_model_len)

        def cost(size: int) -> tuple[int, int]:
            groups = -(-layers // max(coordinates // (size * width), 1))
            # The window may begin within a block, and the sinks have one of their own.
            blocks = -(-self.max_model_len // block_size) + groups * (-(-tokens // size) + 2)
            return max(coordinates, size * width) * blocks, -size

        return min((size for size in range(VECTOR, block_size + 1, VECTOR) if block_size % size == 0), key=cost)


@lru_cache(maxsize=8)
def _plan(config: PluginConfig, max_model_len: int, engine: str) -> Plan:
    """Of an engine, which has a name: its layers ask one by one, and another engine reads the adapter anew."""
    options = cache_config(config, max_model_len)
    adapter = KVAdapter.from_pretrained(config.adapter)
    plan = planned(adapter, options, advise=False)
    return Plan(adapter, plan.allocation, options.sinks, plan.window.at(0), max_model_len)


def plan_of(vllm_config: Any) -> Plan | None:
    """What the layers of an engine store; None where nestling is not configured.

    Raises:
        NestlingError: it is configured wrongly, for another model, for a budget that cannot be met, or beside
            something that is not served; the message names what was given and what is expected.
    """
    config = PluginConfig.read(vllm_config.additional_config)
    if config is None:
        return None
    model = vllm_config.model_config
    plan = _plan(config, model.max_model_len, vllm_config.instance_id)
    plan.adapter.check(model.hf_text_config)
    _check(plan, vllm_config)
    try:
        compiled()
    except KernelError as error:
        raise KernelError(f"nestling's attention in vLLM needs a C compiler: {error}") from error
    return plan


def _check(plan: Plan, vllm_config: Any) -> None:
    """Refuse what vLLM can do and this cannot.

    Raises:
        OptionError, UnsupportedModelError: with the option or the model, and what is expected.
    """
    model, stored, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    layers = plan.adapter.fingerprint["num_hidden_layers"]
    if plan.adapter.shape[0] < layers:
        raise UnsupportedModelError(
            f"model type '{model.hf_text_config.model_type}' has {layers} layers, of which {plan.adapter.shape[0]} "
            "have full attention: in vLLM nestling serves models whose layers all have"
        )
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(f"dtype={model.dtype}: nestling's cache in vLLM expects bfloat16 or float32")
    if stored.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise OptionError(f"kv_cache_dtype={stored.cache_dtype!r}: beside nestling's cache expected 'auto'")
    if stored.block_size % VECTOR:
        raise OptionError(f"block_size={stored.block_size}: nestling's cache expects a multiple of {VECTOR}")
    if parallel.world_size > 1:
        raise OptionError(f"nestling's cache in vLLM has one worker, and this engine {parallel.world_size}")
    for name in ("speculative_config", "kv_transfer_config"):
        if getattr(vllm_config, name) is not None:
            raise OptionError(f"{name} is given: it cannot be used beside nestling's cache in vLLM")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise OptionError("disable_hybrid_kv_cache_manager is set: nestling's cache has two groups, leave it out")
