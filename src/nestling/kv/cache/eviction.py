"""Token eviction by attention mass (heavy hitters, H2O, arXiv 2306.14048), beside the compression of what is kept.

Each KV head of each layer keeps the tokens that its queries have read most, of those between sinks and recent ones.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SLACK = 64  # tokens above the share before some are evicted: each time, all that is kept is copied once
QUERY_BLOCK = 256  # queries whose attention weights exist at a time


class HeavyHitters:
    """How much the tokens that a layer holds were read: ``mass`` ``[Hkv, B, held]`` fp32, in the order of the text.

    Args:
        share: of all tokens so far, how many are kept, sinks and recent ones included.
        sinks, window: leading and recent tokens that are never evicted.
    """

    def __init__(self, share: float, sinks: int, window: int):
        self.share, self.sinks, self.window = share, sinks, window
        self.mass: Tensor | None = None
        self.evicted = 0

    def add(self, mass: Tensor) -> None:
        """Add what the queries of one call read, ``[Hkv, B, held]``: new tokens have come at the end."""
        if self.mass is not None:
            mass[..., : self.mass.shape[-1]] += self.mass
        self.mass = mass

    def choose(self, length: int, first: int, recent: int) -> Tensor | None:
        """Which tokens between the ``first`` and the ``recent`` ones to keep, ``[Hkv, B, k]`` in order; None for all.

        Args:
            length: tokens of the text so far, evicted ones included.
        """
        assert self.mass is not None, "nothing was read"
        middle = self.mass.shape[-1] - first - recent
        allowed = max(math.ceil(self.share * length) - first - recent, 0)
        if middle <= allowed + SLACK:
            return None
        kept = self.mass[..., first : first + middle].topk(allowed).indices.sort().values
        ends = [self.mass[..., :first], self.mass[..., first + middle :]]
        self.mass = torch.cat((ends[0], self.mass[..., first : first + middle].gather(-1, kept), ends[1]), -1)
        self.evicted += middle - allowed
        return kept

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens."""
        if self.mass is not None:
            self.mass = self.mass[..., : self.mass.shape[-1] - remove].clone()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to what is stored; the batch is dimension 1."""
        if self.mass is not None:
            self.mass = change(self.mass)

    def reset(self) -> None:
        self.mass, self.evicted = None, 0

    @property
    def nbytes(self) -> int:
        return 0 if self.mass is None else self.mass.untyped_storage().nbytes()


def attention_mass(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The attention weights of each key, added up over queries and the heads of a group: ``[Hkv, B, T]`` fp32.

    Args:
        query: ``[B, Hq, Tq, D]``, the last Tq of the T tokens.
        keys: ``[B, Hkv, T, D]``.
        mask: as SDPA takes it; None is causal.
    """
    batch, heads, length, _ = query.shape
    total = keys.new_zeros(keys.shape[1], batch, keys.shape[2], dtype=torch.float32)
    places = torch.arange(keys.shape[2], device=keys.device)
    for start in range(0, length, QUERY_BLOCK):
        rows = query[:, :, start : start + QUERY_BLOCK].float().unflatten(1, (keys.shape[1], -1))
        score = rows @ keys[:, :, None].float().mT * scaling  # [B, Hkv, G, q, T]
        if mask is None:
            own = keys.shape[2] - length + start + torch.arange(rows.shape[3], device=keys.device)
            score = score.masked_fill(places > own[:, None], -torch.inf)
        else:
            part = mask[:, :, start : start + QUERY_BLOCK] if mask.shape[2] > 1 else mask
            part = part[:, :, None]
            score = (
                score.masked_fill(~part, torch.finfo(score.dtype).min) if part.dtype == torch.bool else score + part
            )
        total += score.softmax(-1).sum((2, 3)).transpose(0, 1)
    return total
