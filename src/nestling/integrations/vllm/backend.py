"""The attention backend that vLLM's own for processors is replaced by, and what it does in a layer."""

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from nestling.errors import UnsupportedModelError
from nestling.integrations.vllm.config import PluginConfig
from nestling.integrations.vllm.exact import CommonBuilder, ExactCache
from nestling.integrations.vllm.kernels import Heads, PagedLayer
from nestling.integrations.vllm.plan import Plan, plan_of

log = init_logger("vllm.nestling")


class NestedBackend(CPUAttentionBackend):
    """vLLM's own backend, but for engines that nestling is configured for."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        config = get_current_vllm_config_or_none()
        if config is None or PluginConfig.read(config.additional_config) is None:
            return CPUAttentionBackendImpl
        return NestedImpl


class RankBackend(NestedBackend):
    """That of layers whose pages have a rank: subclasses say which."""

    rank: int

    @classmethod
    def customize_spec(cls, spec):
        return replace(spec, head_size=cls.rank, head_size_v=cls.rank)

    @staticmethod
    def get_builder_cls() -> type[CommonBuilder]:
        return CommonBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers of a block side by side: where each layer has its own region, vLLM pads pages to one size."""
        return (KVCacheLayout.BLHNC,)


@functools.cache  # vLLM groups layers by the names of their backends
def backend_of(rank: int) -> type[RankBackend]:
    """The backend of layers with that rank."""
    return type(f"RankBackend{rank}", (RankBackend,), {"rank": rank})


class NestedImpl(CPUAttentionBackendImpl):
    """Attention of a layer over coordinates and exact tokens."""

    paged: PagedLayer
    exact: ExactCache | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config = get_current_vllm_config()
        plan = plan_of(self.config)
        assert plan is not None, "the backend has asked"
        self.plan: Plan = plan
        unserved = {
            "attention that is not causal": self.attn_type != AttentionType.DECODER,
            "ALiBi": self.alibi_slopes is not None,
            "a sliding window": self.sliding_window != -1,
            "soft-capped logits": bool(self.logits_soft_cap),
            "sink logits": self.sinks is not None,
            "keys and values of another layer": self.kv_sharing_target_layer_name is not None,
        }
        if reasons := [reason for reason, there in unserved.items() if there]:
            raise UnsupportedModelError(f"a layer has {reasons[0]}, which nestling's cache in vLLM does not serve")

    def process_weights_after_loading(self, act_dtype) -> None:
        """The first time that all layers are known, and before they are asked what their caches hold."""
        super().process_weights_after_loading(act_dtype)
        plan, context = self.plan, self.config.compilation_config.static_forward_context
        name, layer = next((n, m) for n, m in context.items() if getattr(m, "impl", None) is self)
        row, dtype = extract_layer_index(name), layer.kv_cache_torch_dtype
        heads = Heads(self.num_kv_heads, self.num_queries_per_kv, self.head_size, self.scale, dtype)
        bases = plan.bases(row, dtype)
        self.paged = PagedLayer(heads, bases, plan.sinks, plan.window)
        layer.attn_backend = backend_of(plan.ranks[row])
        if bases is not None:
            chunk, block_size = self.config.max_in_flight_tokens, self.config.cache_config.block_size
            self.exact = ExactCache(layer, plan.reach, plan.exact_block_size(block_size, chunk), context)
        if row == 0:
            _tell(plan, self.config)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        exact = None
        if self.exact is not None:
            exact = self.exact.kv_cache, get_forward_context().slot_mapping[self.exact.prefix]
        self.paged.store(key, value, (kv_cache, slot_mapping), exact)

    def forward(
        self, layer, query: Tensor, key, value, kv_cache: Tensor, attn_metadata, output: Tensor, *args, **kwargs
    ):
        if attn_metadata is None:  # while vLLM warms up
            return output
        pages = [(kv_cache, attn_metadata.block_table_tensor)]
        if self.exact is not None:
            metadata = get_forward_context().attn_metadata[self.exact.prefix]
            pages.append((self.exact.kv_cache, metadata.block_table_tensor))
        starts = attn_metadata.query_start_loc[: attn_metadata.num_reqs + 1]
        self.paged.attend(query, output, pages, starts, attn_metadata.seq_lens)
        return output


def _tell(plan: Plan, config: Any) -> None:
    """Say what is stored, and what makes more room."""
    ranks, width, chunk = plan.ranks, plan.adapter.shape[2], config.max_in_flight_tokens
    log.info(
        "nestling: %d layers at ranks %d to %d of %d, %.1f on average; %d to %d tokens of a request exact",
        len(ranks), min(ranks), max(ranks), width, sum(ranks) / len(ranks), plan.sinks + plan.window,
        plan.sinks + plan.reach,
    )  # fmt: skip
    if chunk > plan.max_model_len // 4:
        log.warning(
            "nestling: while a prompt is read, up to %d tokens of it are exact at once, and vLLM keeps room for them: "
            "a smaller --max-num-batched-tokens, such as 256, leaves room for more requests",
            min(chunk, plan.max_model_len),
        )
