"""One attention layer of a nested cache: what it stores, and what it hands to the attention function.

A layer sorts its KV heads into rank groups, the unit of storage, and keeps sinks and recent tokens of all heads in an
exact store. `NestedLayer.update` returns a handle instead of tensors, which `nestling.kv.integration.attach` calls to
attend to both. The layer carries the bases, so caches of several budgets can serve one model at the same time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nestling.errors import CacheMismatchError, OptionError
from nestling.kv.cache import attention as coordinates
from nestling.kv.cache.bases import LayerBases
from nestling.kv.cache.eviction import HeavyHitters
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.groups import RankGroup
from nestling.kv.cache.handle import NestedHandle
from nestling.kv.cache.packed import PackedRows
from nestling.kv.cache.shrink import copy_truncated
from nestling.kv.cache.split import Split
from nestling.kv.cache.stored import StoredLayer
from nestling.kv.cache.window import Window
from nestling.kv.integration.modes import full_precision, traced
from nestling.kv.integration.owner import Owner

DRAFT = 32  # a call of up to this many tokens may be a draft, of which some are taken back
RECORDED = 128  # tokens that can be taken back where a generation has said that it will


class NestedLayer(StoredLayer):
    """The compressed cache of one attention layer; see `NestedCache` for the options.

    Everything stored has the layer's heads first, in the order of its groups.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        groups: list[RankGroup],
        exact: ExactStore | None,
        bases: LayerBases,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        exact_prompt: bool,
        hitters: HeavyHitters | None = None,
        index: int = 0,
    ):
        super().__init__()
        self.index = index
        self.hitters = hitters
        self.config, self.dtype, self.exact_prompt = config, dtype, exact_prompt
        self._store_in(groups, exact, bases)
        self.length = 0
        self.traced = False  # whether a graph was built from what is stored
        self.record_past = False  # whether tokens are taken back, of those since the last crop
        self.pending = 0  # tokens since then
        self.draft = 0  # of the next call, tokens at its end that are no prompt
        self._shape: tuple[int, int, int] | None = None
        self.owner = Owner(config)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.bases: LayerBases
        if (device := self._stored_on()) is not None:  # a file may be read onto another device
            self.device = device
            if self.bases.device != device:  # those of a layer that nothing is compressed in have no tensors
                old = self.bases
                units = None if old.units is None else old.units.to(device)
                self.bases = LayerBases(old.sides, old.biases, old.width, device, units=units)
        for group, sides in zip(self.groups, self.bases.sides, strict=True):
            group.use(sides)
        if self.exact is not None:
            self.exact.units = self.bases.units

    def _stored_on(self) -> torch.device | None:
        stored = [*(self.exact.data if self.exact is not None else ())]
        for rows in (rows for group in self.groups for rows in group.rows):
            data = (rows.codes if isinstance(rows, PackedRows) else rows).data
            stored += [] if data is None else [data]
        return stored[0].device if stored else None

    @property
    def biases(self) -> Sequence[Tensor | None]:
        """See `LayerBases`."""
        return self.bases.biases

    @property
    def drift(self) -> Tensor | None:
        """See `LayerBases`. None where tokens are evicted: those that are left do not lie in a row."""
        return self.bases.drift if self.hitters is None else None

    def _store_in(self, groups: list[RankGroup], exact: ExactStore | None, bases: LayerBases) -> None:
        self.groups, self.exact, self.bases = groups, exact, bases
        if exact is not None:
            exact.units = bases.units
        self.uncompressed = all(rows.dim == 2 for group in groups for rows in group.rows)
        self.quantised = any(layout.widths for group in groups for layout in group.layouts)
        order = self._order()
        self.heads = len(order)
        self.order: tuple[Tensor, Tensor] | None = None  # from the model's order of heads to the groups', and back
        if order != sorted(order):
            there = torch.tensor(order, device=bases.device)
            self.order = there, there.argsort()

    def check_module(self, module) -> None:
        """Raise `CacheMismatchError` unless ``module`` is the attention module that this layer was made for."""
        self.owner.check(module)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        if key_states.shape[1] != self.heads:
            raise CacheMismatchError(f"keys have {key_states.shape[1]} heads, this cache was made for {self.heads}")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append keys and values ``[B, Hkv, t, D]`` and return a handle (twice) that attends to all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, count, width = key_states.shape
        if self._shape != (batch, heads, width):
            if self._shape is not None:
                raise CacheMismatchError(
                    f"this cache holds [batch, heads, width] = {list(self._shape)} and was given "
                    f"{[batch, heads, width]}: use a cache per batch, or cache.reset() first"
                )
            self._shape = (batch, heads, width)
        if self.quantised:
            self._check_finite(key_states, value_states)
        if self.traced and not torch.is_grad_enabled():
            self._apply(lambda t: t.detach().clone())  # the graph may still be needed, but not by what comes
            self.traced = False
        self.traced = self.traced or traced(key_states, value_states)
        first = self.exact_prompt and self.length == 0
        prompt = max(count - self.draft, 1) if first else 0
        keep = self.may_go(count)
        self.pending, self.draft, self.record_past = keep * self.record_past, 0, self.record_past and keep > 0
        with full_precision(key_states.device):
            states = self.heads_first(key_states), self.heads_first(value_states)
            split = self._split(states, prompt)
            for gone in [states] if self.exact is None else self.exact.append(states, self.dtype, keep):
                for group in self.groups:
                    group.append(gone, self.dtype)
        self.length += count
        handle = NestedHandle(self, (key_states, value_states) if first else None, prompt, split)
        return handle, handle

    def may_go(self, count: int) -> int:
        """How many of the last tokens may be taken back once ``count`` new ones have come."""
        if not self.record_past:
            return count if 1 < count <= DRAFT else 0
        if self.pending and self.pending + count > RECORDED:
            return 0  # nobody has taken back anything for so long: the drafts are over
        return self.draft or min(self.pending + count, RECORDED)

    def _split(self, states: Sequence[Tensor], prompt: int) -> Split | None:
        """What each query of new tokens after the prompt sees, if they do not all see the same."""
        count, exact = states[0].shape[2], self.exact
        if exact is None or not exact.window or count - prompt <= 1:
            return None
        lengths = range(exact.total + prompt + 1, exact.total + count + 1)
        borders = [exact.coded(length) for length in lengths]
        if borders[0] == borders[-1]:
            return None
        new = exact.rounded(states, self.dtype)
        exact_states = exact.view() or [state[:, :, :0] for state in new]
        whole = [torch.cat(pair, 2) for pair in zip(exact_states, new, strict=True)]
        sinks = min(exact.total + count, exact.sinks)
        evicted = exact.left - self.groups[0].length
        return Split(
            [side[:, :, :sinks] for side in whole],
            [side[:, :, sinks:] for side in whole],
            exact.left,
            borders,
            evicted,
        )

    def activate_past_recording(self) -> None:
        """Keep what is needed to take back all tokens since the last `crop` from now on, up to `RECORDED`."""
        self.record_past, self.pending = True, 0

    def _check_finite(self, *states: Tensor) -> None:
        """A code for NaN would be read as a number."""
        for name, state in zip(("keys", "values"), states, strict=True):
            if not torch.isfinite(state).all():
                raise CacheMismatchError(f"layer {self.index}: {name} hold NaN or infinity, which cannot be quantised")

    @property
    def held(self) -> int:
        """Tokens held: all but the evicted ones."""
        return self.length - (0 if self.hitters is None else self.hitters.evicted)

    def evict(self) -> None:
        """Forget the tokens that were read least, if more are held than the share allows."""
        if self.hitters is None or self.pending:  # what may be taken back does not count yet
            return
        tokens = self.held
        first = min(self.hitters.sinks, tokens) if self.exact is None else self.exact.first
        recent = min(self.hitters.window, tokens - first) if self.exact is None else self.exact.length - first
        places = self.hitters.choose(self.length, first, recent)
        if places is None:
            return
        if self.exact is not None:
            self.exact.drop_spare()
        else:  # sinks and recent tokens lie with the others
            ends = torch.arange(tokens, device=places.device).expand(*places.shape[:2], -1)
            places = torch.cat((ends[..., :first], places + first, ends[..., tokens - recent :]), -1)
        for group in self.groups:
            group.select(places)

    def expand(self, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of all tokens, ``[B, Hkv, T, D]``: as they are stored where nothing is compressed."""
        if self.uncompressed:
            states = [rows.coordinates(dtype) for rows in self.groups[0].rows]
        else:
            with full_precision(self.device):
                states = coordinates.expand(self.groups, self.exact, self.biases, self.drift, dtype)
        return [self.heads_second(side) for side in states]

    def count_reads(self, mass: Tensor, places: Tensor | None = None) -> None:
        """Tell the heavy hitters what was read, ``[Hkv, B, columns]`` in the order of the groups.

        ``places``: which of the tokens held each column is; None where they are all of them, or the first.
        """
        if places is not None:
            mass = mass.new_zeros(*mass.shape[:2], self.held).index_add_(2, places, mass)
        if self.hitters is not None:
            self.hitters.add(mass)

    def _order(self) -> list[int]:
        """Heads of the model in the order in which they are stored."""
        return [head for group in self.groups for head in group.heads]

    def move(self, groups: list[RankGroup], exact: ExactStore | None, bases: LayerBases) -> None:
        """Store what is held in other groups, which keep no more of it; tensors that both have are not copied.

        Args:
            groups: empty, or with what the present ones hold where it stays as it is; see `RankGroup`.
            exact: an empty store, used if this layer has none yet since nothing was compressed; or else its window.
            bases: of the groups.
        """
        if self.length:
            order_before = self._order()
            order = [order_before.index(head) for group in groups for head in group.heads]
            there = None if order == sorted(order) else torch.tensor(order, device=self.device)
            if self.uncompressed and exact is not None:
                exact.units = bases.units
                exact.left = self.length - self.held  # evicted tokens are between sinks and recent ones
                keys, values = (_reordered(rows.coordinates(self.dtype), there) for rows in self.groups[0].rows)
                for gone in exact.append((keys, values), self.dtype):
                    for group in groups:
                        group.append(gone, self.dtype)
                if self.held < self.length:
                    exact.drop_spare()
            else:
                copy_truncated(groups, self.groups, self.dtype)
                exact = self.exact
                if exact is not None:
                    exact.apply(lambda tensor: _reordered(tensor, there))
            if self.hitters is not None:
                self.hitters.apply(lambda tensor: _reordered(tensor, there))
        self._store_in(groups, exact, bases)

    def keep_exact(self, window: Window) -> None:
        """Keep that window from now on: tokens that it does not reach are compressed."""
        if self.exact is not None:
            for gone in self.exact.release(window, self.dtype):
                for group in self.groups:
                    group.append(gone, self.dtype)

    def heads_first(self, states: Tensor) -> Tensor:
        """``[B, Hkv, ...]`` to ``[Hkv, B, ...]``, heads in the order of the groups."""
        if self.order is not None:
            states = states.index_select(1, self.order[0])
        return states.transpose(0, 1)

    def heads_second(self, states: Tensor) -> Tensor:
        """``[Hkv, B, ...]`` to ``[B, Hkv, ...]``, heads in the order of the model."""
        if self.order is not None:
            states = states.index_select(0, self.order[1])
        return states.transpose(0, 1)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        evicted = 0 if self.hitters is None else self.hitters.evicted
        return self.length - evicted + query_length, evicted

    def get_max_length(self) -> int:
        return -1

    def stored_after(self, count: int, exact: ExactStore | None) -> tuple[int, int]:
        """Tokens that would be held with ``count`` new ones, those in coordinates and all of them.

        Args:
            exact: the store that there would be, empty: by its window tokens leave, or stay exact.
        """
        tokens = self.held + count
        if exact is None:
            return tokens, tokens
        if self.exact is None:
            return exact.leaving(tokens), tokens
        left = self.exact.left
        total = self.exact.total + count
        return self.groups[0].length + max(exact.coded(total) - left, 0), tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a count of zero or less, as in transformers)."""
        if tokens_to_remove > 0:
            raise OptionError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        remove = min(-tokens_to_remove, self.length)
        if remove:
            if self.hitters is not None and self.hitters.evicted:
                exact = self.exact
                recent = self.hitters.window if exact is None else exact.length - exact.first + exact.spare
                if remove > recent:
                    raise CacheMismatchError(f"{remove} tokens cannot be taken back: before them some were evicted")
            if self.hitters is not None:
                self.hitters.crop(remove)
        self.pending = 0
        gone = remove if self.exact is None else self.exact.crop(remove)
        for group in self.groups:
            group.crop(gone)
        self.length -= remove
        if self.length:
            self.evict()

    def reset(self) -> None:
        for part in self._parts():
            part.reset()
        self.length, self._shape, self.is_initialized, self.traced = 0, None, False, False
        self.record_past, self.pending, self.draft = False, 0, 0

    def _parts(self) -> list:
        """All that stores something."""
        return [*self.groups, *(part for part in (self.exact, self.hitters) if part is not None)]


def _reordered(tensor: Tensor, there: Tensor | None) -> Tensor:
    return tensor if there is None else tensor.index_select(0, there)
