"""The exact store: sinks and recent tokens of one layer, all heads at full width, in one buffer that never grows."""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 16  # recent tokens that are encoded at once, when the store is full


def capacity(sinks: int, window: int, block: int = BLOCK) -> int:
    """Tokens that a layer's exact store has room for: they are paid for out of the budget."""
    return sinks + (window + block - 1 if window else 0)


def coded(length, sinks: int, window: int, block: int = BLOCK):
    """How many of ``length`` tokens (an int, or a tensor of them) are not exact any more: the rule of the store."""
    block = block if window else 1
    left = length - sinks - window
    return left * (left > 0) // block * block


class ExactStore:
    """Keys and values of exact tokens, ``[Hkv, B, capacity, D]``: sinks first, then the most recent ones in order.

    A new token is written in place. When there is no room, the oldest recent tokens leave, ``block`` at a time, to be
    encoded. So from ``window`` to ``window + block - 1`` recent tokens are exact. How many depends on the length of
    the text alone, not on how it was cut into calls. With ``window=0`` there are none: tokens leave as they come.
    """

    def __init__(self, sinks: int, window: int, block: int = BLOCK):
        self.sinks, self.window = sinks, window
        self.block = block if window else 1
        self.capacity = capacity(sinks, window, block)
        self.data: list[Tensor] = []  # keys, values
        self._flat: list[Tensor] = []  # the same memory
        self.length = 0

    @property
    def first(self) -> int:
        """Sinks held so far."""
        return min(self.length, self.sinks)

    def append(self, states: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Take in keys and values ``[Hkv, B, t, D]``; returns pairs, oldest first, that are no longer exact."""
        if not self.data:
            heads, batch, _, width = states[0].shape
            self._store([s.new_empty(heads, batch, self.capacity, width, dtype=dtype) for s in states])
        count = states[0].shape[2]
        if self.length + count <= self.capacity:
            self._write(states, self.length)
            self.length += count
            return []
        if missing := self.sinks - self.first:
            self._write([s[:, :, :missing] for s in states], self.first)
            states = states[0][:, :, missing:], states[1][:, :, missing:]
            self.length, count = self.sinks, count - missing
        return self._roll(states, self.length - self.sinks, count)

    def leaving(self, count: int) -> int:
        """How many of the tokens held and ``count`` new ones leave when those are appended."""
        beyond = self.length + count - self.capacity
        return -(-max(beyond, 0) // self.block) * self.block

    def _roll(self, states: tuple[Tensor, Tensor], recent: int, count: int) -> list[tuple[Tensor, ...]]:
        """Make room for ``count`` new tokens after ``recent`` held ones: the oldest of both leave, in whole blocks."""
        leave = self.leaving(count)
        held, new = min(leave, recent), max(leave - recent, 0)
        gone = []
        if held:
            rows = [side[:, :, self.sinks : self.length].clone() for side in self.data]
            gone.append(tuple(r[:, :, :held] for r in rows))
            self._write([r[:, :, held:] for r in rows], self.sinks)
        if new:
            gone.append(tuple(s[:, :, :new].to(self.data[0].dtype) for s in states))
        self._write([s[:, :, new:] for s in states], self.length - held)
        self.length += count - leave
        return gone

    def _write(self, states, start: int) -> None:
        count = states[0].shape[2]
        for side, state in zip(self.data, states, strict=True):
            side.narrow(2, start, count).copy_(state)

    def view(self) -> list[Tensor]:
        """Keys and values in use, ``[Hkv, B, length, D]``."""
        return [side.narrow(2, 0, self.length) for side in self.data]

    def flat(self) -> list[Tensor]:
        """Keys and values in use as products take them, ``[Hkv * B, length, D]``."""
        return [side.narrow(1, 0, self.length) for side in self._flat]

    def crop(self, remove: int, coded: int) -> int:
        """Forget the last ``remove`` tokens of a layer with ``coded`` ones between sinks and recent ones.

        Returns how many of the coded ones are to be forgotten. The recent ones go first: a crop beyond them leaves
        none, and the store fills again from there.
        """
        recent = min(remove, self.length - self.first)
        middle = min(remove - recent, coded)
        self.length -= recent + max(remove - recent - middle, 0)
        return middle

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by ``change(storage)``; the batch is dimension 1."""
        self._store([change(side).contiguous() for side in self.data])

    def _store(self, data: list[Tensor]) -> None:
        self.data, self._flat = data, [side.flatten(0, 1) for side in data]

    def reset(self) -> None:
        self.data, self._flat, self.length = [], [], 0

    @property
    def nbytes(self) -> int:
        return sum(side.untyped_storage().nbytes() for side in self.data)
