"""NestedCache: a transformers cache that stores the first coordinates of keys and values, in really smaller tensors.

A layer sorts its KV heads into rank groups. A group is the unit of storage: it encodes and appends new tokens, and
attends to what it holds. `NestedLayer.update` returns a handle to both instead of tensors; `nestling.kv.attention`
calls the handle. The handle carries the bases, so caches of several budgets can serve one model at the same time.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from nestling.kv import attention
from nestling.kv.allocate import RankTable
from nestling.kv.groups import GroupView, RankGroup

CHUNK = 256  # tokens by which storage grows
SHORT_QUERY = 16  # up to this many query tokens, attend in coordinates; above, decode one layer's history once


class CacheMismatchError(ValueError):
    """A cache was used with a model, batch or shape that it was not made for."""


@dataclass(frozen=True)
class NestedHandle:
    """Stands for keys and values between `NestedLayer.update` and the attention function."""

    groups: list[GroupView]
    exact: tuple[Tensor, Tensor] | None
    layer: "NestedLayer"

    def attend(self, module, query: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]``; ``exact`` keys and values, if given, replace the stored ones."""
        self.layer.check_module(module)
        if self.exact is not None:
            return attention.sdpa(module, query, *self.exact, mask, **kwargs)
        uncompressed = all(g.key_decode is None and g.value_decode is None for g in self.groups)
        causal = mask is None and query.shape[2] > 1  # no mask for several tokens: SDPA is told to be causal
        if uncompressed or causal or query.shape[2] > SHORT_QUERY:
            keys, values = self._by_head([g.expand(query.dtype) for g in self.groups])
            return attention.sdpa(module, query, keys, values, mask, **kwargs)
        return self._attend_in_coordinates(query, mask, kwargs["scaling"])

    def _attend_in_coordinates(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        batch, query_heads, length, width = query.shape
        kv_heads = sum(len(g.heads) for g in self.groups)
        packed = query.reshape(batch, kv_heads, -1, width)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, query_heads // kv_heads, 1)
        (out,) = self._by_head([(group.attend(packed, mask, scaling),) for group in self.groups])
        return out.to(query.dtype).reshape(batch, query_heads, length, width).transpose(1, 2).contiguous()

    def _by_head(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Join the groups' tensors ``[B, h, ...]`` in the order of the model's heads."""
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([h for g in self.groups for h in g.heads]).argsort().tolist()
        return tuple(torch.cat(tensors, 1)[:, order] for tensors in zip(*parts, strict=True))

    def __getattr__(self, name: str):
        raise AttributeError(
            f"a nested cache layer was read as a tensor ('{name}'): the model's attention implementation is not "
            f"'{attention.NAME}'. Call nestling.kv.attach(model), or make the cache with adapter.cache(model, ...)."
        )


class NestedLayer(CacheLayerMixin):
    """The compressed cache of one attention layer; see `NestedCache` for the options."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self, groups: list[RankGroup], config: PreTrainedConfig, dtype: torch.dtype | None, exact_prompt: bool
    ):
        super().__init__()
        self.groups, self.config, self.storage_dtype, self.exact_prompt = groups, config, dtype, exact_prompt
        self.length = 0
        self._shape: tuple[int, int, int] | None = None
        self._module: weakref.ref | None = None

    def check_module(self, module) -> None:
        """Raise `CacheMismatchError` unless ``module`` is the attention module that this layer was made for."""
        if self._module is None and getattr(module, "config", self.config) == self.config:
            self._module = weakref.ref(module)
        if self._module is None or self._module() is not module:
            raise CacheMismatchError("this cache was made for another model: make one with adapter.cache(model, ...)")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = self.storage_dtype or key_states.dtype, key_states.device
        heads = sum(len(g.heads) for g in self.groups)
        if key_states.shape[1] != heads:
            raise CacheMismatchError(f"keys have {key_states.shape[1]} heads, this cache was made for {heads}")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append keys and values ``[B, Hkv, t, D]`` and return a handle (twice) that attends to all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shape = (key_states.shape[0], key_states.shape[1], key_states.shape[3])
        if self._shape is not None and shape != self._shape:
            raise CacheMismatchError(
                f"this cache holds [batch, heads, width] = {list(self._shape)} and was given {list(shape)}: "
                "use a cache per batch, or cache.reset() first"
            )
        self._shape = shape
        for group in self.groups:
            group.append(key_states, value_states, self.dtype)
        exact = (key_states, value_states) if self.exact_prompt and self.length == 0 else None
        self.length += key_states.shape[2]
        handle = NestedHandle([g.view() for g in self.groups], exact, self)
        return handle, handle

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a count of zero or less, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        remove = min(-tokens_to_remove, self.length)
        if remove:
            for group in self.groups:
                group.crop(remove)
            self.length -= remove

    def reset(self) -> None:
        for group in self.groups:
            group.reset()
        self.length, self._shape, self.is_initialized = 0, None, False

    def _apply(self, change: Callable[[Tensor], Tensor], batch: int | None = None) -> None:
        for group in self.groups:
            group.apply(change)
        if batch is not None and self._shape is not None:
            self._shape = (batch, *self._shape[1:])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)), len(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._shape is not None:
            self._apply(lambda t: t.repeat_interleave(repeats, 0), self._shape[0] * repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._shape is not None:
            self._apply(lambda t: t[indices], len(torch.arange(self._shape[0])[indices.cpu()]))

    def offload(self) -> None:
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda t: t.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @property
    def full_elements(self) -> int:
        """Elements of full keys and values for the tokens and batch held."""
        batch, heads, width = self._shape or (0, 0, 0)
        return 2 * batch * heads * self.length * width


class NestedCache(Cache):
    """A cache for ``model.generate(past_key_values=...)`` that holds a share of the stock cache's bytes.

    Made by `KVAdapter.cache`. Layers with full attention are `NestedLayer`; the others are transformers' own.

    Attributes:
        ranks: the `RankTable` in use.
        config: the model's (text) config.
    """

    def __init__(self, layers: list, ranks: RankTable, config: PreTrainedConfig, **kwargs):
        super().__init__(layers=layers, **kwargs)
        self.ranks, self.config = ranks, config

    @property
    def nbytes(self) -> int:
        """Bytes of storage really held, by all layers: untyped storages, so slack and exact tokens are included."""
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that a stock cache in bf16 would hold for the same tokens and batch, without slack."""
        return sum(_layer_elements(layer) for layer in self.layers) * 2


def make_cache(
    bases: dict[int, dict[str, Tensor]],
    ranks: RankTable,
    config: PreTrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    sinks: int = 0,
    window: int = 0,
    exact_prompt: bool = True,
    chunk: int = CHUNK,
    offloading: bool = False,
) -> NestedCache:
    """Assemble a cache from bases by layer index and a rank table whose rows follow the same layers."""
    layers = attention.stock_layers(config)
    for row, (index, layer_bases) in enumerate(bases.items()):
        on_device = {name: tensor.to(device) for name, tensor in layer_bases.items()}
        groups = [RankGroup(heads, on_device, pair, sinks, window, chunk) for heads, pair in ranks.groups(row)]
        layers[index] = NestedLayer(groups, config, dtype, exact_prompt)
    return NestedCache(layers, ranks, config, offloading=offloading)


def _stored(layer) -> list[Tensor]:
    """Keys and values of a stock layer, if it has any yet."""
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


def _layer_nbytes(layer) -> int:
    if isinstance(layer, NestedLayer):
        return layer.nbytes
    return sum(t.untyped_storage().nbytes() for t in _stored(layer))


def _layer_elements(layer) -> int:
    """Elements that a stock layer holds for the same tokens."""
    if isinstance(layer, NestedLayer):
        return layer.full_elements
    return sum(t.numel() for t in _stored(layer))
