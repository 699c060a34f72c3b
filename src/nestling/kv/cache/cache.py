"""NestedCache: a transformers cache that stores the first coordinates of keys and values, in really smaller tensors.

Its layers are in `nestling.kv.cache.layer`; here they are put together from bases and a table, and made smaller
together.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nestling.errors import BudgetError, CacheMismatchError
from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.budget import read_share
from nestling.kv.allocation.ranks import RankTable
from nestling.kv.cache.draft import DraftWatch
from nestling.kv.cache.eviction import HeavyHitters
from nestling.kv.cache.exact import BLOCK, ExactStore
from nestling.kv.cache.factory import Maker
from nestling.kv.cache.groups import RankGroup, shared_biases
from nestling.kv.cache.layer import NestedLayer
from nestling.kv.cache.packed import Layout
from nestling.kv.cache.stored import StoredCache
from nestling.kv.integration import attach as attention
from nestling.kv.integration.modes import default_mode

CHUNK = 256  # tokens by which storage grows
STEP_DOWN = 0.9  # from one budget that is tried for a limit to the next

Table = RankTable | BitTable
Members = list[tuple[list[int], tuple[Layout, Layout]]]  # heads that are stored alike, and how keys and values are


class NestedCache(StoredCache):
    """A cache for ``model.generate(past_key_values=...)`` that holds a share of the stock cache's bytes.

    Made by `KVAdapter.cache`. Layers with full attention are `NestedLayer`; the others are transformers' own.

    Attributes:
        ranks: the `RankTable` or `BitTable` in use.
        config: the model's (text) config.
        budget: the share of the full cache that is in use; `shrink` and ``limit`` lower it.
        limit: bytes that the compressed layers never exceed, or None: the budget falls as the text grows.
    """

    def __init__(self, layers: list, ranks: Table, config: PreTrainedConfig, **kwargs):
        super().__init__(layers=layers, **kwargs)
        self.ranks, self.config = ranks, config
        self.storage = Storage()
        self.remake: Maker | None = None
        self.budget = 1.0
        self.limit: int | None = None
        self.rotary_limit = attention.rotary_limit(config)

    def start(self, remake: Maker, itemsize: int) -> None:
        """Give an empty cache what it can be shrunk by, and its budget and limit.

        Raises:
            BudgetError: for a limit that not one token fits into.
        """
        self.remake, self.budget = remake, remake.share
        if remake.limit is not None:
            self.limit = remake.limit.limit
            least = self._expected(1, 1, itemsize, remake.table(remake.smallest))
            if least > (self.limit or 0):
                raise BudgetError(f"{remake.limit.given} is out of reach: a first token takes {_mib(least)}")

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
        assert self.limit is not None and self.remake is not None
        first = self._nested()[0][1]
        dtype = first.storage_dtype or dtype or first.dtype
        if first.length:
            dtype = torch.promote_types(dtype, first.dtype)
        tokens, draft = first.length + new, first.may_go(new) if new else first.room_for_drafts
        if self._expected(batch, tokens, dtype.itemsize, draft=draft) <= self.limit:
            return
        budget, smallest = self.budget, self.remake.smallest
        while budget > smallest:
            budget = max(STEP_DOWN * budget, smallest)
            table = self.remake.table(budget)
            ahead = tokens // 8 if budget > smallest else 0
            if table is not None and self._expected(batch, tokens + ahead, dtype.itemsize, table, draft) <= self.limit:
                return self._store_by(table, budget)
        table = self.remake.table(smallest)
        needed = _mib(self._expected(batch, tokens, dtype.itemsize, table, draft))
        what = f"{tokens} tokens of {batch} texts" if batch > 1 else f"{tokens} tokens"
        limit = self.remake.limit.given if self.remake.limit else f"limit={self.limit}"
        raise BudgetError(f"{limit}: {what} take {needed} at the smallest budget, {smallest:.4g}, and do not fit")

    def _expected(self, batch: int, tokens: int, itemsize: int, table: Table | None = None, draft: int = 0) -> int:
        """Bytes that the nested layers take when the text has that many tokens, by the table in use or another one.

        ``draft``: how many of them may be taken back, which costs room.
        """
        nested, table = self._nested(), self.ranks if table is None else table
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
        if self.remake is None:
            raise CacheMismatchError("this cache was made with a table, not with a budget: it cannot be shrunk")
        asked = read_share(budget)
        assert asked.share is not None
        if asked.share > self.budget:
            raise BudgetError(f"{asked.given} is larger than the one in use, {self.budget:g}: a cache only shrinks")
        self._store_by(self.remake.required(asked), asked.share)

    def _store_by(self, table: Table, budget: float) -> None:
        """Store by another table, which keeps no more of anything unless the cache is empty."""
        assert self.remake is not None
        if self.offloading and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # copies may be under way
        with default_mode(gradients=False):
            for row, (_, layer) in enumerate(self._nested()):
                members = _members(table, row, layer.groups[0].width)
                if members != [(group.heads, group.layouts) for group in layer.groups]:
                    bases = self.remake.bases(row, layer.groups[0].device)
                    layer.move(*self.storage.parts(bases, members, layer.groups))
        self.ranks, self.budget = table, budget

    def reset(self) -> None:
        """Forget all tokens: the cache is as it was when it was made, at its first budget and limit."""
        super().reset()
        if self.remake is not None:
            self._store_by(self.remake.required(self.remake.budget), self.remake.share)
            self.limit = None if self.remake.limit is None else self.remake.limit.limit

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
        """Bytes that a stock cache in bf16 would hold for the same tokens and batch, without slack."""
        return sum(_layer_elements(layer) for layer in self.layers) * 2


@dataclass(frozen=True, slots=True)
class Storage:
    """What layers are put together from: exact tokens, blocks in which they are encoded, and growth, all in tokens."""

    sinks: int = 0
    window: int = 0
    block: int = BLOCK
    chunk: int = CHUNK

    def exact(self, full: bool) -> ExactStore | None:
        """An empty exact store, if a layer has one: there is none where nothing is compressed, at ``full`` ranks."""
        return ExactStore(self.sinks, self.window, self.block) if (self.sinks or self.window) and not full else None

    def parts(
        self, bases: dict[str, Tensor], members: Members, present: Sequence[RankGroup] = ()
    ) -> tuple[list[RankGroup], ExactStore | None, list[Tensor | None]]:
        """Groups, exact store and biases of a layer: all empty, but for what groups in use hold that stays as it is.

        Args:
            bases: of the layer, see `RankGroup`.
            present: groups in use.
        """
        width = bases["key_encode"].shape[-1]
        full = all(len(layout.plain) == width for _, pair in members for layout in pair)
        groups: list[RankGroup] = []
        for heads, pair in members:
            start = groups[-1].stop if groups else 0
            same = next((group for group in present if group.heads == heads), None)
            groups.append(RankGroup(heads, start, bases, pair, self.chunk, full, same))
        return groups, self.exact(full), shared_biases(groups, bases)


def make_cache(
    bases: dict[int, dict[str, Tensor]],
    ranks: Table,
    config: PreTrainedConfig,
    *,
    device: torch.device | Mapping[int, torch.device],
    dtype: torch.dtype | None = None,
    sinks: int = 0,
    window: int = 0,
    block: int = BLOCK,
    exact_prompt: bool = True,
    chunk: int = CHUNK,
    offloading: bool = False,
    tokens: float = 1.0,
) -> NestedCache:
    """Assemble a cache from bases by layer index and a rank table whose rows follow the same layers.

    Args:
        device: of all bases, or of each layer's.
    """
    layers, storage = attention.stock_layers(config), Storage(sinks, window, block, chunk)
    for row, (index, layer_bases) in enumerate(bases.items()):
        own = device[index] if isinstance(device, Mapping) else device
        on_device = {name: tensor.to(own) for name, tensor in layer_bases.items()}
        groups, exact, biases = storage.parts(on_device, _members(ranks, row, on_device["key_encode"].shape[-1]))
        hitters = HeavyHitters(tokens, sinks, window) if tokens < 1 else None
        layers[index] = NestedLayer(groups, exact, biases, config, dtype, exact_prompt, hitters, index)
    cache = NestedCache(layers, ranks, config, offloading=offloading)
    cache.storage = storage
    return cache


def _members(table: Table, row: int, width: int) -> Members:
    """Heads of a layer that are stored alike, and how; by their first heads, most often the model's order."""
    if isinstance(table, RankTable):
        return [(heads, (Layout.of_rank(k), Layout.of_rank(v))) for heads, (k, v) in sorted(table.groups(row))]
    return [(h, (Layout.of_bits(k, width), Layout.of_bits(v, width))) for h, (k, v) in sorted(table.groups(row))]


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


def _layer_elements(layer) -> int:
    """Elements that a stock layer holds for the same tokens."""
    if isinstance(layer, NestedLayer):
        return layer.full_elements
    return sum(t.numel() for t in _stored(layer))
