"""NestedCache: a transformers cache that stores the first coordinates of keys and values, in really smaller tensors.

Its layers are in `nestling.kv.cache.layer`; here they are put together from bases and an allocation, and made smaller
together.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nestling.errors import BudgetError, CacheMismatchError
from nestling.kv.allocation.budget import WINDOW, Budget, read_share
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache import files
from nestling.kv.cache.bases import LayerBases, Members, nbytes, shared
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.draft import DraftWatch
from nestling.kv.cache.eviction import HeavyHitters
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.factory import CacheFactory, planned
from nestling.kv.cache.layer import NestedLayer
from nestling.kv.cache.storage import Storage, is_full, members
from nestling.kv.cache.stored import StoredCache
from nestling.kv.cache.window import TOKENS_PER_BLOCK
from nestling.kv.integration.attach import (
    attach,
    layer_devices,
    rotary_limit,
    stock_layers,
    text_config,
    warn_of_rotation,
)
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
        allocation: the bits of every block of coordinates, as they are in use.
        config: the model's (text) config.
        budget: the share of the full cache that is in use; `shrink` and a limit lower it.
        limit: bytes that the compressed layers never exceed, or None: the budget falls as the text grows.

    Raises:
        OptionError: if an option has a value or a type that it cannot have.
        AdapterError: if the model is not the one the adapter was made for.
        BudgetError: if the budget or allocation cannot be met; the message has the smallest budget that can.
    """

    allocation: Allocation
    config: PreTrainedConfig
    storage: Storage
    options: CacheConfig
    factory: CacheFactory | None = None
    budget: float = 1.0
    limit: int | None = None
    rotary_limit: int | None = None

    @in_default_mode
    def __init__(
        self,
        model: Any,
        adapter: "KVAdapter",
        budget: "float | str | Budget | Allocation | Mapping | CacheConfig | None" = None,
    ):
        options = budget if isinstance(budget, CacheConfig) else CacheConfig(budget=budget)
        adapter.check(model)
        dtype = storage_dtype(model.dtype, options)
        factory, allocation, window, rows = planned(adapter, options, advise=dtype.itemsize == 2)
        if allocation.quantised and dtype.itemsize != 2:
            raise BudgetError(
                f"dtype={dtype}: beside quantised coordinates it must be one of 16 bits; or say quantise=False"
            )
        layers, devices = adapter.fingerprint["layers"], layer_devices(model)

        def bases(row: int, stored_alike: Members) -> LayerBases:
            return shared(adapter, row, stored_alike, devices[layers[row]], dtype.itemsize == 2)

        storage = Storage(options.sinks, window, TOKENS_PER_BLOCK, options.context, rows)
        self._assemble(layers, bases, allocation, text_config(model), storage, dtype, options)
        if factory is not None:
            self._start(factory, dtype.itemsize)
        self.model, self.options = weakref.ref(model), options
        attach(model)
        warn_of_rotation(model, stacklevel=3)

    def _assemble(
        self,
        indices: Sequence[int],
        bases: Callable[[int, Members], LayerBases],
        allocation: Allocation,
        config: PreTrainedConfig,
        storage: Storage,
        dtype: torch.dtype,
        options: CacheConfig,
    ) -> None:
        """Empty layers.

        Args:
            indices: of the compressed layers, in the order of the allocation's rows.
            bases: those of a row, for heads that are stored alike.
        """
        layers, width = stock_layers(config), allocation.width
        for row, index in enumerate(indices):
            stored_alike = members(allocation, row)
            layer_bases, full = bases(row, stored_alike), is_full(width, stored_alike)
            keep, groups = options.keep_tokens, storage.groups(layer_bases, stored_alike)
            recent = WINDOW if options.window is None else options.window  # where no exact store says which they are
            hitters = HeavyHitters(keep, storage.sinks, recent) if keep < 1 else None
            exact, prompt = storage.exact(full), options.exact_prompt
            layers[index] = NestedLayer(groups, exact, layer_bases, config, dtype, prompt, hitters, index)
        super().__init__(layers=layers)
        self.allocation, self.config, self.storage = allocation, config, storage
        self.rotary_limit = rotary_limit(config)

    def _start(self, factory: CacheFactory, itemsize: int) -> None:
        """Give an empty cache what it can be shrunk by, and its budget and limit.

        Raises:
            BudgetError: for a limit that not one token fits into.
        """
        self.factory, self.budget = factory, factory.share
        if factory.limit is not None:
            self.limit = factory.limit.limit
            least = self._expected(1, 1, itemsize, factory.at(factory.smallest), self._storage_at(factory.smallest))
            if least > (self.limit or 0):
                raise BudgetError(f"{factory.limit.given} is out of reach: a first token takes {_mib(least)}")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self.limit is not None and layer_idx <= self._nested()[0][0]:  # before any layer has taken in new tokens
            self._make_room(key_states.shape[0], key_states.shape[2])
        if self.rotary_limit is not None and layer_idx == self._nested()[0][0]:
            self._warn_of_rotation(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _warn_of_rotation(self, new: int) -> None:
        """Say when the text reaches the length at which the model rotates all keys anew, see `structure`."""
        limit, length = self.rotary_limit or 0, self._nested()[0][1].length
        if length <= limit <= length + new and (length or new == limit):
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

    def _make_room(self, batch: int, new: int) -> None:
        """Shrink as far as ``new`` tokens take, and an eighth of all more, so that it is not done for every token.

        Raises:
            BudgetError: if they do not fit at the smallest budget; the cache is as it was.
        """
        assert self.limit is not None and self.factory
        first = self._nested()[0][1]
        itemsize, tokens = first.dtype.itemsize, first.length + new

        def places(storage: Storage) -> int:
            if new:
                return ExactStore(storage.sinks, storage.window).with_draft(tokens, first.may_go(new))
            return max(0 if layer.exact is None else layer.exact.size for _, layer in self._nested())

        if self._expected(batch, tokens, itemsize, places=places(self.storage)) <= self.limit:
            return
        budget, smallest = self.budget, self.factory.smallest
        while budget > smallest:
            budget = max(STEP_DOWN * budget, smallest)
            allocation, storage = self.factory.at(budget), self._storage_at(budget)
            ahead = tokens // 8 if budget > smallest else 0
            counts = {tokens, tokens + ahead}  # in a short text more tokens may take less, since some leave
            if allocation is not None and all(
                self._expected(batch, count, itemsize, allocation, storage, places(storage)) <= self.limit
                for count in counts
            ):
                return self._store_by(allocation, budget)
        allocation, storage = self.factory.at(smallest), self._storage_at(smallest)
        needed = _mib(self._expected(batch, tokens, itemsize, allocation, storage, places(storage)))
        what = f"{tokens} tokens of {batch} texts" if batch > 1 else f"{tokens} tokens"
        limit = self.factory.limit.given if self.factory.limit else f"limit={self.limit}"
        raise BudgetError(f"{limit}: {what} take {needed} at the smallest budget, {smallest:.4g}, and do not fit")

    def _storage_at(self, budget: float) -> Storage:
        assert self.factory
        return replace(self.storage, window=self.factory.window(budget))

    def _expected(
        self, batch: int, tokens: int, itemsize: int, allocation: Allocation | None = None,
        storage: Storage | None = None, places: int = 0,
    ) -> int:  # fmt: skip
        """Bytes that the nested layers take when the text has that many tokens, by what is in use or by other things.

        ``places``: at least so many of exact tokens, which drafts that may be taken back need.
        """
        allocation, storage, total = allocation or self.allocation, storage or self.storage, 0
        sizes = zip(self._nested(), allocation.token_bytes(itemsize), allocation.full, strict=True)
        for (_, layer), size, full in sizes:
            exact, states = storage.exact(full), (layer.heads, allocation.width, itemsize)
            stored, tokens_held = layer.stored_after(tokens - layer.length, exact)
            total += storage.nbytes(tokens, size, states, full, stored, tokens_held)
            if exact is not None:
                more = max(places - exact.places(tokens, tokens - (tokens_held - stored), stored), 0)
                total += storage.exact_nbytes(more, states) - storage.exact_nbytes(0, states)
            if layer.hitters is not None:
                total += 4 * layer.heads * tokens_held
        return batch * total

    def shrink(self, budget: Any) -> None:
        """Lower the budget of a cache in use: coordinates and bits are dropped in place, a layer at a time.

        What is left is what a cache of that budget would hold of the same tokens, and is not read again: as many
        recent tokens stay exact as there. The same budget again changes nothing.

        Args:
            budget: share of the full cache, such as ``0.25`` or ``"25%"``; see
                `nestling.kv.allocation.budget.read_budget`.

        Raises:
            BudgetError: if the budget is no share, out of reach, or larger than the one in use; nothing has changed.
            CacheMismatchError: if the cache was made with an allocation and not with a budget.
        """
        if self.factory is None:
            raise CacheMismatchError("this cache was made with an allocation, not with a budget: it cannot be shrunk")
        asked = read_share(budget)
        assert asked.share is not None
        if asked.share > self.budget:
            raise BudgetError(f"{asked.given} is larger than the one in use, {self.budget:g}: a cache only shrinks")
        self._store_by(self.factory.required(asked), asked.share)

    def _store_by(self, allocation: Allocation, budget: float) -> None:
        """Store by another allocation, which keeps no more of anything unless the cache is empty."""
        assert self.factory is not None
        self.storage = self._storage_at(budget)
        with default_mode(gradients=False):
            for row, (_, layer) in enumerate(self._nested()):
                width, device = layer.bases.width, layer.bases.device
                stored_alike = members(allocation, row)
                if stored_alike != [(group.heads, group.layouts) for group in layer.groups]:
                    bases = shared(self.factory.adapter, row, stored_alike, device, layer.dtype.itemsize == 2)
                    groups = self.storage.groups(bases, stored_alike, layer.groups)
                    layer.move(groups, self.storage.exact(is_full(width, stored_alike)), bases)
                layer.keep_exact(self.storage.window)
        self.allocation, self.budget = allocation, budget

    def save(self, path: str | Path) -> None:
        """Write what was read to a file, whole or not at all: `load` goes on with it, in another process too.

        The file is safetensors, without the bases, which are the adapter's, and without the ids of the tokens.

        Raises:
            FileError: it cannot be written. A file that was there is as it was.
        """
        files.save(self, path)

    @classmethod
    @in_default_mode
    def load(cls, path: str | Path, model: Any, adapter: "KVAdapter") -> "NestedCache":
        """A cache from a file of `save`: what follows is read as if it had never been written.

        Args:
            model: the causal LM that read the tokens, perhaps loaded again.
            adapter: that of the cache.

        Raises:
            FileError: the file cannot be read, is truncated, damaged or something else.
            CacheMismatchError: it was saved for another model or with another adapter.
        """
        return files.load(cls, path, model, adapter)

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
    def shared_nbytes(self) -> int:
        """Bytes of the bases, means and steps that this cache reads its coordinates by: the same however long the text
        grows, neither in `nbytes` nor under ``limit``. All caches of an adapter and an allocation on a device, and
        copies of them, share them."""
        return nbytes(layer.bases for _, layer in self._nested())


def storage_dtype(model: torch.dtype, options: CacheConfig) -> torch.dtype:
    """The dtype that is stored: the one asked for; else the model's, or bfloat16 if that has more than 16 bits."""
    if options.dtype is not None:
        return getattr(torch, options.dtype)
    return model if model in (torch.float16, torch.bfloat16) else torch.bfloat16


def _mib(size: int) -> str:
    """Bytes as MiB, rounded up so that the number can be used as a limit."""
    return f"{math.ceil(size / 2**20 * 10_000) / 10_000:.4f} MiB"
