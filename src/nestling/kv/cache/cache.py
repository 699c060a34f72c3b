"""NestedCache: a transformers cache that stores the first coordinates of keys and values, in really smaller tensors.

Its layers are in `nestling.kv.cache.layer`; here they are put together from bases and a table, and made smaller
together.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nestling.errors import BudgetError, CacheMismatchError
from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.budget import Budget, read_share
from nestling.kv.allocation.ranks import RankTable
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.draft import DraftWatch
from nestling.kv.cache.eviction import HeavyHitters
from nestling.kv.cache.exact import BLOCK
from nestling.kv.cache.factory import CacheFactory
from nestling.kv.cache.layer import NestedLayer
from nestling.kv.cache.storage import CHUNK, Storage, Table, members
from nestling.kv.cache.stored import StoredCache
from nestling.kv.integration import attach as attention
from nestling.kv.integration.modes import default_mode, in_default_mode

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

STEP_DOWN = 0.9  # from one budget that is tried for a limit to the next


class NestedCache(StoredCache):
    """A cache for ``model.generate(past_key_values=...)`` that holds a share of the stock cache's bytes.

    Layers with full attention are `NestedLayer`; the others are transformers' own. The model is switched to read it.

    Args:
        model: the causal LM that the adapter was made for.
        adapter: its nested bases.
        budget: a share of the full cache of the compressed layers, above 0 and at most 1 (``0.25``), or text:
            ``"25%"``, ``"2.5bits"`` per coordinate, ``"64MiB"`` that are never exceeded; see
            `nestling.kv.allocation.budget.read_budget`. Or an allocation, or its dict; or a `CacheConfig` with more
            options.

    Attributes:
        allocation: the table of ranks or bits in use.
        config: the model's (text) config.
        budget: the share of the full cache that is in use; `shrink` and a limit lower it.
        limit: bytes that the compressed layers never exceed, or None: the budget falls as the text grows.

    Raises:
        OptionError: if an option has a value or a type that it cannot have.
        AdapterError: if the model is not the one the adapter was made for.
        BudgetError: if the budget or allocation cannot be met; the message has the smallest budget that can.
    """

    allocation: Table
    config: PreTrainedConfig
    storage: Storage
    factory: CacheFactory | None = None
    budget: float = 1.0
    limit: int | None = None
    rotary_limit: int | None = None

    @in_default_mode
    def __init__(
        self,
        model: Any,
        adapter: "KVAdapter",
        budget: "float | str | Budget | RankTable | BitTable | Mapping | CacheConfig | None" = None,
    ):
        options = budget if isinstance(budget, CacheConfig) else CacheConfig(budget=budget)
        adapter.check(model)
        factory, dtype = None, None if options.dtype is None else getattr(torch, options.dtype)
        if isinstance(options.budget, RankTable | BitTable | Mapping):
            table = _given_table(adapter, options)
        else:
            factory = CacheFactory(adapter, options, advise=dtype is None or dtype.itemsize == 2)
            table = factory.required(factory.budget)
        if isinstance(table, BitTable):
            dtype = dtype or (model.dtype if model.dtype.itemsize == 2 else torch.bfloat16)
            if dtype.itemsize != 2:
                raise BudgetError(
                    f"dtype={dtype}: beside quantised coordinates it must be one of 16 bits; or say quantise=False"
                )
        self._assemble(
            {layer: adapter._layer_bases(row) for row, layer in enumerate(adapter.fingerprint["layers"])},
            table,
            attention.text_config(model),
            Storage(options.sinks, options.window, BLOCK, CHUNK),
            device=attention.layer_devices(model),
            dtype=dtype,
            exact_prompt=options.exact_prompt,
            keep_tokens=options.keep_tokens,
        )
        if factory is not None:
            self._start(factory, (dtype or model.dtype).itemsize)
        self.model = weakref.ref(model)
        attention.attach(model)
        attention.warn_of_rotation(model, stacklevel=3)

    def _assemble(
        self,
        bases: dict[int, dict[str, Tensor]],
        table: Table,
        config: PreTrainedConfig,
        storage: Storage,
        *,
        device: torch.device | Mapping[int, torch.device],
        dtype: torch.dtype | None = None,
        exact_prompt: bool = True,
        keep_tokens: float = 1.0,
    ) -> None:
        """Empty layers from bases by layer index and a table whose rows follow the same layers.

        Args:
            device: of all bases, or of each layer's.
        """
        layers = attention.stock_layers(config)
        for row, (index, layer_bases) in enumerate(bases.items()):
            own = device[index] if isinstance(device, Mapping) else device
            on_device = {name: tensor.to(own) for name, tensor in layer_bases.items()}
            groups, exact, biases = storage.parts(on_device, members(table, row, on_device["key_encode"].shape[-1]))
            hitters = HeavyHitters(keep_tokens, storage.sinks, storage.window) if keep_tokens < 1 else None
            layers[index] = NestedLayer(groups, exact, biases, config, dtype, exact_prompt, hitters, index)
        super().__init__(layers=layers)
        self.allocation, self.config, self.storage = table, config, storage
        self.rotary_limit = attention.rotary_limit(config)

    def _start(self, factory: CacheFactory, itemsize: int) -> None:
        """Give an empty cache what it can be shrunk by, and its budget and limit.

        Raises:
            BudgetError: for a limit that not one token fits into.
        """
        self.factory, self.budget = factory, factory.share
        if factory.limit is not None:
            self.limit = factory.limit.limit
            least = self._expected(1, 1, itemsize, factory.table(factory.smallest))
            if least > (self.limit or 0):
                raise BudgetError(f"{factory.limit.given} is out of reach: a first token takes {_mib(least)}")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self.limit is not None and layer_idx <= self._nested()[0][0]:  # before any layer has taken in new tokens
            self._make_room(key_states.shape[0], key_states.shape[2], key_states.dtype)
        if self.rotary_limit is not None and layer_idx == self._nested()[0][0]:
            self._warn_of_rotation(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _warn_of_rotation(self, new: int) -> None:
        """Say when the text reaches the length at which the model rotates all keys anew, see `structure`."""
        limit, held = self.rotary_limit or 0, self._nested()[0][1].length
        if held <= limit <= held + new and (held or new == limit):
            warnings.warn(
                f"the text has reached {limit} tokens, where {self.config.model_type} rotates all keys anew: those in "
                "this cache do not fit what follows. generate() goes on without it, with a stock cache at full size; "
                f"to go on in a small one, read the whole text, of more than {limit} tokens, with a new one",
                stacklevel=3,
            )

    def activate_past_recording(self) -> None:
        """Keep what it takes to have tokens taken back, from now on: drafts will come."""
        super().activate_past_recording()
        if self.model is not None and (model := self.model()) is not None and not self.get_seq_length():
            DraftWatch(model, self)

    def expect_draft(self, tokens: int) -> None:
        """Of the next call, so many tokens at the end are a draft and belong to no prompt."""
        for _, layer in self._nested():
            layer.draft = tokens

    def _nested(self) -> list[tuple[int, NestedLayer]]:
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, NestedLayer)]

    def _make_room(self, batch: int, new: int, dtype: torch.dtype | None = None) -> None:
        """Shrink as far as ``new`` tokens take, and an eighth of all more, so that it is not done for every token.

        Raises:
            BudgetError: if they do not fit at the smallest budget; the cache is as it was.
        """
        assert self.limit is not None and self.factory is not None
        first = self._nested()[0][1]
        dtype = first.storage_dtype or dtype or first.dtype
        if first.length:
            dtype = torch.promote_types(dtype, first.dtype)
        tokens, draft = first.length + new, first.may_go(new) if new else first.room_for_drafts
        if self._expected(batch, tokens, dtype.itemsize, draft=draft) <= self.limit:
            return
        budget, smallest = self.budget, self.factory.smallest
        while budget > smallest:
            budget = max(STEP_DOWN * budget, smallest)
            table = self.factory.table(budget)
            ahead = tokens // 8 if budget > smallest else 0
            if table is not None and self._expected(batch, tokens + ahead, dtype.itemsize, table, draft) <= self.limit:
                return self._store_by(table, budget)
        table = self.factory.table(smallest)
        needed = _mib(self._expected(batch, tokens, dtype.itemsize, table, draft))
        what = f"{tokens} tokens of {batch} texts" if batch > 1 else f"{tokens} tokens"
        limit = self.factory.limit.given if self.factory.limit else f"limit={self.limit}"
        raise BudgetError(f"{limit}: {what} take {needed} at the smallest budget, {smallest:.4g}, and do not fit")

    def _expected(self, batch: int, tokens: int, itemsize: int, table: Table | None = None, draft: int = 0) -> int:
        """Bytes that the nested layers take when the text has that many tokens, by the table in use or another one.

        ``draft``: how many of them may be taken back, which costs room.
        """
        nested, table = self._nested(), self.allocation if table is None else table
        width, total = nested[0][1].groups[0].width, 0
        for (_, layer), size, full in zip(nested, table.token_bytes(width, itemsize), table.full(width), strict=True):
            exact = self.storage.exact(full)
            stored, held = layer.stored_after(tokens - layer.length, exact)
            total += size * -(-stored // self.storage.chunk) * self.storage.chunk
            if exact is not None:
                total += 2 * layer.heads * width * (exact.capacity + draft) * itemsize
            if layer.hitters is not None:
                total += 4 * layer.heads * held
        return batch * total

    def shrink(self, budget: Any) -> None:
        """Lower the budget of a cache in use: coordinates and bits are dropped in place, a layer at a time.

        What is left is what a cache of that budget would hold of the same tokens, and is not read again. Exact
        tokens stay exact. The same budget again changes nothing.

        Args:
            budget: share of the full cache, such as ``0.25`` or ``"25%"``; see
                `nestling.kv.allocation.budget.read_budget`.

        Raises:
            BudgetError: if the budget is no share, out of reach, or larger than the one in use; nothing has changed.
            CacheMismatchError: if the cache was made with a table of its own and not with a budget.
        """
        if self.factory is None:
            raise CacheMismatchError("this cache was made with a table, not with a budget: it cannot be shrunk")
        asked = read_share(budget)
        assert asked.share is not None
        if asked.share > self.budget:
            raise BudgetError(f"{asked.given} is larger than the one in use, {self.budget:g}: a cache only shrinks")
        self._store_by(self.factory.required(asked), asked.share)

    def _store_by(self, table: Table, budget: float) -> None:
        """Store by another table, which keeps no more of anything unless the cache is empty."""
        assert self.factory is not None
        with default_mode(gradients=False):
            for row, (_, layer) in enumerate(self._nested()):
                stored_alike = members(table, row, layer.groups[0].width)
                if stored_alike != [(group.heads, group.layouts) for group in layer.groups]:
                    bases = self.factory.bases(row, layer.groups[0].device)
                    layer.move(*self.storage.parts(bases, stored_alike, layer.groups))
        self.allocation, self.budget = table, budget

    def reset(self) -> None:
        """Forget all tokens: the cache is as it was when it was made, at its first budget and limit."""
        super().reset()
        if self.factory is not None:
            self._store_by(self.factory.required(self.factory.budget), self.factory.share)
            self.limit = None if self.factory.limit is None else self.factory.limit.limit

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._room_for_batch(lambda rows: rows.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._room_for_batch(lambda rows: rows[indices.cpu()])
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._room_for_batch(lambda rows: rows[beam_idx.cpu()])
        super().reorder_cache(beam_idx)

    def _room_for_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Shrink as far as a batch needs whose rows are changed."""
        first = self._nested()[0][1]
        if self.limit is not None and first.length:
            batch = len(change(torch.arange(first.batch)))
            if batch > first.batch:
                self._make_room(batch, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of storage really held, by all layers: untyped storages, so slack and exact tokens are included.

        Bases are not: see `basis_nbytes`.
        """
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def basis_nbytes(self) -> int:
        """Bytes of the bases, means and steps that this cache reads its coordinates by: the same however long the text
        grows, neither in `nbytes` nor under ``limit``. Each cache and each copy of one has its own."""
        tensors = [tensor for _, layer in self._nested() for tensor in layer.basis_tensors()]
        return sum(
            {(str(t.device), t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    @property
    def full_nbytes(self) -> int:
        """Bytes that a stock cache of the stored dtype would hold for the same tokens and batch, without slack."""
        return sum(_layer_full_nbytes(layer) for layer in self.layers)

    @property
    def share(self) -> float:
        """What is held, of the bytes of a full cache of the stored dtype; 0 while nothing is."""
        return self.nbytes / self.full_nbytes if self.full_nbytes else 0.0


def _given_table(adapter: "KVAdapter", options: CacheConfig) -> Table:
    """An allocation that the user gave in place of a budget.

    Raises:
        BudgetError: if it does not fit the adapter, or if there is another budget beside it.
    """
    for name in ("limit", "allocation"):
        if getattr(options, name) is not None:
            raise BudgetError(f"{name}={getattr(options, name)!r}: an allocation is a budget by itself, leave it out")
    table = options.budget
    return adapter.bits(1, table) if isinstance(table, BitTable) else adapter.ranks(1, table)


def _mib(size: int) -> str:
    """Bytes as MiB, rounded up so that the number can be used as a limit."""
    return f"{math.ceil(size / 2**20 * 10_000) / 10_000:.4f} MiB"


def _stored(layer) -> list[Tensor]:
    """Keys and values of a stock layer, if it has any yet."""
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


def _layer_nbytes(layer) -> int:
    if isinstance(layer, NestedLayer):
        return layer.nbytes
    return sum(t.untyped_storage().nbytes() for t in _stored(layer))


def _layer_full_nbytes(layer) -> int:
    """Bytes that a stock layer would hold for the same tokens."""
    if isinstance(layer, NestedLayer):
        return layer.full_elements * layer.dtype.itemsize if layer.length else 0
    return sum(t.nbytes for t in _stored(layer))
