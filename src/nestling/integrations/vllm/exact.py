"""The second cache of each layer: sinks and recent tokens, exact, in a group of blocks of its own.

vLLM's scheduler allocates, frees, hashes and hits these blocks as those of layers with a sliding window. Their manager
differs from the stock one in that it never lets go of a request's first block, where the sinks are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

KVCacheSpecRegistry._ensure_registered()  # a registry with any entry is taken to have all


class SinkWindowManager(SlidingWindowManager):
    """The blocks of a sliding window, and the first one of every request."""

    def remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, 1, min(skipped, len(self.req_to_blocks[request_id])))

    def get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, *args, **kwargs) -> int:
        """One more where a prefix is hit: the first block may be one that could be evicted."""
        blocks = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        return blocks + bool(new_computed_blocks)

    def add_local_computed_blocks(self, request_id, new_computed_blocks, *args, **kwargs) -> None:
        """Take over a prefix that is hit: the stock manager leaves out all blocks before the window."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        if new_computed_blocks and blocks and blocks[0].is_null and not new_computed_blocks[0].is_null:
            self.block_pool.touch(new_computed_blocks[:1])
            blocks[0] = new_computed_blocks[0]

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
    ):
        """A hit of the window that has the first block as well, or none."""
        blocks, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        if not length or not blocks[0][0].is_null:
            return blocks, length
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=kwargs.get("alignment_tokens", args[1] if len(args) > 1 else None),
        )
        first = block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if not first:
            return tuple([] for _ in blocks), 0
        for group, block in zip(blocks, first, strict=True):
            group[0] = block
        return blocks, length

    @classmethod
    def reachable_block_mask(cls, start_block, *args, **kwargs):
        """Which blocks are worth keeping for later requests: the first one always."""
        mask = super().reachable_block_mask(start_block, *args, **kwargs)
        if mask and start_block == 0:
            mask[0] = True
        return mask


@register_kv_cache_spec(manager_class=SinkWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """What blocks of sinks and recent tokens hold."""

    def max_admission_blocks_per_request(self, *args, **kwargs) -> int:
        """Those of a window, and the one of the sinks."""
        return super().max_admission_blocks_per_request(*args, **kwargs) + 1


class CommonBuilder(AttentionMetadataBuilder):
    """Gives what vLLM tells all builders: lengths, blocks and places are all that the kernels need."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata


class ExactBackend(AttentionBackend):
    """The backend that vLLM takes the exact cache to have; it is read by that of the coordinates."""

    @staticmethod
    def get_name() -> str:
        return "NESTLING_EXACT"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("exact tokens are read with the coordinates")

    @staticmethod
    def get_builder_cls() -> type[CommonBuilder]:
        return CommonBuilder


class ExactCache(nn.Module, AttentionLayerBase):
    """The exact cache of an attention layer, known to vLLM as a layer of its own.

    Args:
        layer: vLLM's attention layer.
        window: recent tokens that may be exact.
        block_size: tokens in a block.
        context: vLLM's layers by name, where it is entered.
    """

    def __init__(self, layer: Any, window: int, block_size: int, context: dict[str, Any]):
        super().__init__()
        self.prefix, self.kv_cache = f"{layer.layer_name}.exact", torch.tensor([])
        self.spec = SinkWindowSpec(
            block_size=block_size,
            sliding_window=window,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            dtype=layer.kv_cache_torch_dtype,
        )
        context[self.prefix] = self

    def get_attn_backend(self) -> type[ExactBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> SinkWindowSpec:
        return self.spec
