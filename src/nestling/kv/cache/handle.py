"""What a nested cache layer returns in place of keys and values: it knows how to attend to what the layer holds.

For the few queries of a decode step attention is computed in coordinates, for many at full width, from one layer's
decoded history. Where the queries of a call do not all see the same tokens compressed, `nestling.kv.cache.split` says
which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.kv.cache import attention as coordinates
from nestling.kv.cache.eviction import attention_mass
from nestling.kv.cache.matmul import cast
from nestling.kv.cache.split import QUERIES, Segment, Split
from nestling.kv.integration.attach import NAME, sdpa
from nestling.kv.integration.modes import full_precision

if TYPE_CHECKING:
    from nestling.kv.cache.layer import NestedLayer

SHORT_QUERY = 16  # up to this many query tokens, attend in coordinates; above, decode one layer's history once


@dataclass(slots=True)
class NestedHandle:
    """Stands for keys and values between `NestedLayer.update` and the attention function; good for that one call.

    Attributes:
        exact: keys and values of a first prompt, which attends to them and not to what is stored.
        prompt: how many of its tokens do; those after them are a draft.
        split: what each of the other queries sees, where that is not the same for all.
    """

    layer: "NestedLayer"
    exact: tuple[Tensor, Tensor] | None = None
    prompt: int = 0
    split: Split | None = None

    def attend(self, module, query: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]`` of ``query`` ``[B, Hq, Tq, D]`` under an SDPA mask."""
        self.layer.check_module(module)
        count, prompt = query.shape[2], self.prompt
        if self.exact is None:
            out = self._stored(module, query, mask, **kwargs)
        else:
            states, part = [side[:, :, :prompt] for side in self.exact], None
            if mask is not None:
                part = mask[:, :, :prompt, :prompt]
            out = self._at_full_width(module, query[:, :, :prompt], states, part, **kwargs)
            if prompt < count:
                if mask is None:
                    place = torch.arange(count, device=query.device)
                    mask = (place <= place[:, None])[None, None]
                draft = self._stored(module, query[:, :, prompt:], mask[:, :, prompt:], **kwargs)
                out = torch.cat((out, draft), 1)
        self.layer.evict()
        return out

    def _stored(self, module, query: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention to what the layer holds."""
        layer, count = self.layer, query.shape[2]
        graph = torch.is_grad_enabled() and (query.requires_grad or layer.traced)
        at_full_width = layer.uncompressed or graph or count > SHORT_QUERY or bool(kwargs.get("dropout"))
        if self.split is not None:
            return self._at_borders(module, query, mask, self.split, at_full_width, **kwargs)
        causal = mask is None and count > 1  # no mask for several tokens: SDPA is told to be causal
        if causal or at_full_width:
            states = layer.expand(query.dtype)
            if graph:  # which must not hold on to storage that is written to later
                states = [side if side.requires_grad else side.clone() for side in states]
            return self._at_full_width(module, query, states, mask, **kwargs)
        coded, exact = layer.groups[0].length, layer.exact
        sinks = 0 if exact is None else exact.first
        if mask is not None:
            mask = coordinates.compressed_first(mask, sinks, coded)
        places = None
        if layer.hitters is not None:
            places = coordinates.compressed_first(torch.arange(layer.held, device=query.device), sinks, coded)
        flat = None if exact is None else exact.flat()
        return self._in_coordinates(query, flat, mask, places, kwargs["scaling"])

    def _at_borders(
        self, module, query: Tensor, mask: Tensor | None, split: Split, at_full_width: bool, **kwargs
    ) -> Tensor:
        """Attention of queries that do not all see the same tokens compressed."""
        layer, count = self.layer, query.shape[2]
        with full_precision(query.device):
            if not at_full_width:
                segment = split.segment(-count, 0, mask)
                states = [side.flatten(0, 1) for side in segment.exact]
                return self._in_coordinates(query, states, segment.mask, segment.places, kwargs["scaling"])
            decoded = coordinates.decode(layer.groups, layer.biases, layer.drift, query.dtype)
        outs = []
        for start in range(0, count, QUERIES):
            rows = query[:, :, start : start + QUERIES]
            part = None if mask is None else mask[:, :, start : start + QUERIES]
            with full_precision(query.device):
                segment = split.segment(start - count, start - count + rows.shape[2], part)
                states = self._widened(decoded, segment, query.dtype)
            outs.append(self._at_full_width(module, rows, states, segment.mask, places=segment.places, **kwargs))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _widened(self, decoded: Sequence[Tensor], segment: Segment, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of a segment, ``[B, Hkv, T, D]``."""
        states = []
        for side, exact in enumerate(segment.exact):
            coded = [decoded[side][:, :, : segment.coded]] if decoded else []
            states.append(self.layer.heads_second(torch.cat((*coded, exact.to(dtype)), 2)))
        return states

    def _in_coordinates(
        self, query: Tensor, exact: Sequence[Tensor] | None, mask: Tensor | None, places: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention to compressed tokens as they are stored, and to ``exact`` keys and values ``[Hkv * B, n, D]``."""
        layer, (batch, heads, count, width) = self.layer, query.shape
        with full_precision(query.device):
            packed = layer.heads_first(query.reshape(batch, layer.heads, -1, count, width))
            out, weight = coordinates.attend(packed, layer.groups, exact, layer.biases, layer.drift, mask, scaling)
            if layer.hitters is not None:
                layer.count_reads(weight.float().sum(2), places)
            out = layer.heads_second(out).permute(0, 3, 1, 2, 4)
            return cast(out, query.dtype).reshape(batch, count, heads, width)

    def _at_full_width(
        self, module, query: Tensor, states: Sequence[Tensor], mask: Tensor | None, places=None, **kwargs
    ) -> Tensor:
        """Attention to keys and values ``[B, Hkv, T, D]``."""
        keys, values = states
        out = sdpa(module, query, keys, values, mask, **kwargs)
        if self.layer.hitters is not None:
            with torch.no_grad():
                mass = attention_mass(query, keys, mask, kwargs["scaling"])
            order = self.layer.order
            self.layer.count_reads(mass if order is None else mass.index_select(0, order[0]), places)
        return out

    def __getattr__(self, name: str):
        raise AttributeError(
            f"a nested cache layer was read as a tensor ('{name}'): the model's attention implementation is not "
            f"'{NAME}'. Call nestling.kv.attach(model), or make a cache, NestedCache(model, adapter)."
        )
