"""Several tokens in one call: each of them sees as many tokens compressed as if it had come alone.

Tokens are encoded 16 at a time, so what is exact for the first query of a call may be compressed for its last. What a
query sees depends on its place in the text alone, by the rule of `exact.coded`, and a draft of several tokens that
another model proposed has the logits that decoding them one by one would have. In a call that goes over such a border,
the tokens between the first and the last border are there twice, compressed and exact, and a mask tells each query
which of the two it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 256  # of a long call that are read with one mask


@dataclass(slots=True)
class Segment:
    """Some queries of a call: they see ``coded`` compressed tokens and then exact ones, through a mask.

    Attributes:
        exact: keys and values ``[Hkv, B, n, D]``, sinks first.
        mask: ``[B or 1, 1, queries, coded + n]``, as SDPA takes it.
        places: ``[coded + n]``, which of the tokens held each column is.
    """

    coded: int
    exact: list[Tensor]
    mask: Tensor
    places: Tensor


@dataclass(slots=True)
class Split:
    """What the queries of one call see of a layer. Tokens are counted from the end of the sinks.

    Attributes:
        sinks: keys and values of the sinks, ``[Hkv, B, n, D]``.
        states: keys and values ``[Hkv, B, n, D]`` of the tokens from ``start`` on, exact.
        borders: how many tokens each query sees compressed, rising.
        evicted: tokens that are held no more.
    """

    sinks: Sequence[Tensor]
    states: Sequence[Tensor]
    start: int
    borders: Sequence[int]
    evicted: int = 0

    def segment(self, first: int, last: int, mask: Tensor | None) -> Segment:
        """The queries from ``first`` to before ``last``, counted from the end of the call: -1 is before the last.

        Args:
            mask: theirs, ``[B, 1, queries, tokens held]`` in the order of the text; None is causal.
        """
        device, borders = self.states[0].device, self.borders[first + len(self.borders) : last + len(self.borders)]
        sinks, low, high = self.sinks[0].shape[2], borders[0], borders[-1]
        end = self.start + self.states[0].shape[2]  # tokens of the text
        if mask is None:
            end += last  # the last of the queries sees no later ones
            seen = torch.arange(sinks + end, device=device)
            mask = (seen <= seen[sinks + end - len(borders) :, None])[None, None]
        tokens = torch.arange(sinks + end - self.evicted, device=device)
        coded = high - self.evicted
        parts = (slice(sinks, sinks + coded), slice(sinks), slice(sinks + low - self.evicted, None))
        mask = torch.cat([mask[..., : len(tokens)][..., part] for part in parts], -1)
        self._hide(mask, torch.tensor(borders, device=device)[:, None], low, coded, sinks)
        exact = [
            torch.cat((s, states[:, :, low - self.start : end - self.start]), 2)
            for s, states in zip(self.sinks, self.states, strict=True)
        ]
        return Segment(coded, exact, mask, torch.cat([tokens[part] for part in parts]))

    def _hide(self, mask: Tensor, borders: Tensor, low: int, coded: int, sinks: int) -> None:
        """Of the tokens that are there twice, hide one from each query: the exact one before its border."""
        twice = torch.arange(low, coded + self.evicted, device=mask.device)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        for start, out in ((coded - len(twice), twice >= borders), (coded + sinks, twice < borders)):
            mask[..., start : start + len(twice)].masked_fill_(out, hidden)
