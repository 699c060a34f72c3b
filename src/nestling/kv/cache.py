"""NestedCache: a transformers cache that stores the first coordinates of keys and values, in really smaller tensors.

Its layers are in `nestling.kv.layer`; here they are put together from bases and a table, and made smaller together.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from nestling.errors import BudgetError, CacheMismatchError
from nestling.kv import attention
from nestling.kv.allocate import RankTable
from nestling.kv.bits import BitTable
from nestling.kv.evict import HeavyHitters
from nestling.kv.exact import BLOCK, ExactStore
from nestling.kv.groups import RankGroup, shared_biases
from nestling.kv.layer import NestedLayer
from nestling.kv.packed import Layout

CHUNK = 256  # tokens by which storage grows


class Maker:
    """Makes empty caches like one, of other budgets. Copies of a cache share it, and the model is not kept alive."""

    def __init__(self, make: Callable[..., "NestedCache"], model, options: dict):
        self.make, self.model, self.options = make, weakref.ref(model), options

    def __call__(self, budget: float) -> "NestedCache":
        if (model := self.model()) is None:
            raise CacheMismatchError("the model that this cache was made for is gone")
        return self.make(model, budget, **self.options)

    def __deepcopy__(self, memo) -> "Maker":
        return self


class NestedCache(Cache):
    """A cache for ``model.generate(past_key_values=...)`` that holds a share of the stock cache's bytes.

    Made by `KVAdapter.cache`. Layers with full attention are `NestedLayer`; the others are transformers' own.

    Attributes:
        ranks: the `RankTable` or `BitTable` in use.
        config: the model's (text) config.
    """

    def __init__(self, layers: list, ranks: RankTable | BitTable, config: PreTrainedConfig, **kwargs):
        super().__init__(layers=layers, **kwargs)
        self.ranks, self.config = ranks, config
        self.remake: Maker | None = None
        self.budget = 1.0
        self.limit: int | None = None  # bytes that are never exceeded: the budget falls as the text grows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self.limit is not None and layer_idx == next(i for i, _ in self._nested()):
            itemsize = (self._nested()[0][1].storage_dtype or key_states.dtype).itemsize
            self._make_room(key_states.shape[0], self.get_seq_length() + key_states.shape[2], itemsize)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _nested(self) -> list[tuple[int, NestedLayer]]:
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, NestedLayer)]

    def _make_room(self, batch: int, tokens: int, itemsize: int) -> None:
        """Shrink as far as that many tokens take, and an eighth more, so that it is not done for every token."""
        assert self.limit is not None and self.remake is not None
        if self._expected(batch, tokens, itemsize) <= self.limit:
            return
        budget, most = self.budget, self.limit
        while True:
            budget *= 0.9
            try:
                made = self.remake(budget)
            except BudgetError as error:
                raise BudgetError(
                    f"{tokens} tokens do not fit into a limit of {most / 2**20:.1f} MiB: {error}"
                ) from error
            if made._expected(batch, tokens + tokens // 8, itemsize) <= most:
                return self.shrink(budget)

    def _expected(self, batch: int, tokens: int, itemsize: int) -> int:
        """Bytes that the nested layers take for that many tokens."""
        return sum(layer.expected_bytes(batch, tokens, itemsize) for _, layer in self._nested())

    def shrink(self, budget: float) -> None:
        """Lower the budget of a cache in use: coordinates and bits are dropped in place, a layer at a time.

        What is left is what a cache of that budget would hold of the same tokens, and is not read again. Exact
        tokens stay exact.

        Args:
            budget: share of the full cache, as for `KVAdapter.cache`.

        Raises:
            BudgetError: if the budget is out of reach, or larger than the one in use.
            CacheMismatchError: if the cache was made with a table of its own and not with a budget.
        """
        if self.remake is None:
            raise CacheMismatchError("this cache was made with a table, not with a budget: it cannot be shrunk")
        new = self.remake(budget)
        if (new.ranks.stacked > self.ranks.stacked).any():
            raise BudgetError(f"budget={budget:g} is larger than the one in use: a cache only shrinks")
        for index, (layer, old) in enumerate(zip(new.layers, self.layers, strict=True)):
            if isinstance(layer, NestedLayer) and isinstance(old, NestedLayer):
                layer.take(old)
                self.layers[index] = layer
        self.ranks, self.budget = new.ranks, budget

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
    ranks: RankTable | BitTable,
    config: PreTrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    sinks: int = 0,
    window: int = 0,
    block: int = BLOCK,
    exact_prompt: bool = True,
    chunk: int = CHUNK,
    offloading: bool = False,
    tokens: float = 1.0,
) -> NestedCache:
    """Assemble a cache from bases by layer index and a rank table whose rows follow the same layers."""
    layers = attention.stock_layers(config)
    for row, (index, layer_bases) in enumerate(bases.items()):
        on_device = {name: tensor.to(device) for name, tensor in layer_bases.items()}
        members = _layouts(ranks, row, width := on_device["key_encode"].shape[-1])
        full = all(len(layout.plain) == width for _, pair in members for layout in pair)
        groups: list[RankGroup] = []
        for heads, pair in members:
            start = groups[-1].stop if groups else 0
            groups.append(RankGroup(heads, start, on_device, pair, chunk, by_token=full))
        exact = ExactStore(sinks, window, block) if (sinks or window) and not full else None
        biases = shared_biases(groups, on_device)
        hitters = HeavyHitters(tokens, sinks, window) if tokens < 1 else None
        layers[index] = NestedLayer(groups, exact, biases, config, dtype, exact_prompt, hitters, index)
    return NestedCache(layers, ranks, config, offloading=offloading)


def _layouts(table: RankTable | BitTable, row: int, width: int) -> list[tuple[list[int], tuple[Layout, Layout]]]:
    """Heads of a layer that are stored alike, and how; by their first heads, most often the model's order."""
    if isinstance(table, RankTable):
        return [(heads, (Layout.of_rank(k), Layout.of_rank(v))) for heads, (k, v) in sorted(table.groups(row))]
    return [(h, (Layout.of_bits(k, width), Layout.of_bits(v, width))) for h, (k, v) in sorted(table.groups(row))]


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
