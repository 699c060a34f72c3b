"""The exact store: sinks and recent tokens of one layer, all heads at full width, in one small buffer.

Beside quantised coordinates recent tokens have 8 bits a number, and sinks two times 8. They are next to exact, and the
bytes are worth more in the coordinates: at a sixteenth of the full cache and 2,048 tokens, 16 bits take most of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestling.kv.cache.rule import GROWTH, SHORT, capacity, coded
from nestling.kv.cache.window import TOKENS_PER_BLOCK, Window
from nestling.kv.integration.modes import ordinary, traced
from nestling.kv.quantisation.rows import Units, decode_rows, encode_rows


class ExactStore:
    """Keys and values of exact tokens, ``[Hkv, B, size, D]``: sinks, recent ones in order, and at the end spare ones.

    As many recent tokens as ``window`` says are exact, and up to ``block - 1`` more: when there would be more, the
    oldest leave, ``block`` at a time, to be encoded. How many depends on the length of the text alone, not on how it
    was cut into calls. With a window of 0 there are none: tokens leave as they come.

    A new token is written in place. In a text shorter than `SHORT` times the capacity the store grows with its tokens,
    and has fewer free places; see `places`.

    Tokens that have left stay in the places that are free behind the recent ones until those are written to. They are
    the spare ones, which nothing reads: when a crop takes tokens back they become recent again. So after up to
    ``block - 1`` tokens were taken back, of a short text some fewer, the window is as long as ever. For drafts the
    store makes room.

    Args:
        rows: whether tokens are stored at 8 bits a number (`nestling.kv.quantisation.rows`): what is stored are then
            bytes ``[Hkv, B, size, D + 2]``, and of sinks also those of what these leave out.

    Attributes:
        length: sinks and recent tokens held.
        left: tokens between them: those that have left.
        spare: how many of the last of those are still here.
        units: what numbers in rows are measured in, in the order of heads here; they belong to the bases. None: in
            themselves.
        open: 1 once tokens have come that a gradient passes through: what is stored in rows is then rounded alike, but
            stored as fp32 numbers.
    """

    units: Units | None = None

    def __init__(self, sinks: int, window: Window | int, block: int = TOKENS_PER_BLOCK, *, rows: bool = False):
        self.window = window if isinstance(window, Window) else Window(window)
        self.sinks, self.rows, self.block = sinks, rows, block if window else 1
        self.data: list[Tensor] = []  # keys, values
        self._flat: list[Tensor] = []  # the same memory
        self.rest: list[Tensor] = []  # what the rows of sinks leave out, as rows
        self.length, self.left, self.spare, self.open = 0, 0, 0, 0

    @property
    def first(self) -> int:
        """Sinks held so far."""
        return min(self.length, self.sinks)

    @property
    def size(self) -> int:
        """Tokens that there is room for."""
        return self.data[0].shape[2] if self.data else 0

    def capacity(self, tokens: int) -> int:
        """See `capacity`."""
        return capacity(self.sinks, self.window, tokens, self.block)

    def coded(self, length: int) -> int:
        """How many tokens have left when the text has that many: no fewer than have left by now."""
        return max(coded(length, self.sinks, self.window, self.block), self.left)

    @property
    def total(self) -> int:
        """Tokens of the text that it has seen: those that are exact and those that have left."""
        return self.length + self.left

    def leaving(self, count: int) -> int:
        """How many of the tokens held and ``count`` new ones leave when those are appended."""
        return self.coded(self.total + count) - self.left

    def places(self, tokens: int, left: int, spare: int) -> int:
        """The size of the store without drafts.

        In a short text three quarters of what has left may stay, and one place is not kept free: a cache of a quarter
        takes no more than the full one at any length, and no more than .45 of it at 256 tokens.

        Args:
            tokens: of the text, of which ``left`` have left.
            spare: how many of these are still here, or could be.
        """
        most, exact = self.capacity(tokens), tokens - left
        short = SHORT * capacity(self.sinks, self.window.least, block=self.block)
        if tokens >= min(short, self.window.steady - GROWTH):  # in short texts the capacity must not change
            return max(exact, most)
        return max(exact, min(exact + min(spare, 3 * left // 4), most - 1))

    def with_draft(self, tokens: int, keep: int) -> int:
        """The size of the store if the last ``keep`` of so many tokens may be taken back, or less than it needs."""
        return tokens - coded(tokens - keep, self.sinks, self.window, self.block) if keep and self.window else 0

    def append(self, states: Sequence[Tensor], dtype: torch.dtype, keep: int = 0) -> list[tuple[Tensor, ...]]:
        """Take in keys and values ``[Hkv, B, t, D]``; returns pairs, oldest first, that are no longer exact.

        Args:
            dtype: of the storage, when it is made.
            keep: how many of the last tokens a crop may take back, so that the store is then what it was before them.
        """
        count = states[0].shape[2]
        end, leave = self.total + count, self.leaving(count)
        size = max(self.places(end, self.left + leave, self.spare + leave), self.with_draft(end, keep))
        states = [state.to(dtype) for state in states]
        if self.rows and not self.open and traced(*states):
            self._decode()
        if self.rows:
            states = self.rounded(states, dtype) if self.open else self._encoded(states)
        if leave == 0 and self.data and not traced(*states) and not self.data[0].requires_grad:
            if size > self.size and not self.spare:
                self._grow(size)
            if size == self.size:
                self._write(self.data, states, self.length)
                self.length += count
                self.spare = min(self.spare, size - self.length)
                return []
        old, missing = self._parts(states), self.sinks - self.first
        sinks = [torch.cat((part[0], state[:, :, :missing]), 2) for part, state in zip(old, states, strict=True)]
        recent = [(part[1], state[:, :, missing:]) for part, state in zip(old, states, strict=True)]
        gone = _leaving(recent, leave)
        count = sum(part.shape[2] for part in recent[0])  # with those that leave
        rows = min(size - sinks[0].shape[2], self.spare + count)
        self.left += leave
        last = [_last((part[2], *sides), rows) for part, sides in zip(old, recent, strict=True)]
        self._arrange(sinks, last, count - leave, size)
        if not self.rows:
            return gone
        # Rounded to the dtype as well, so that what is stored of them does not depend on how wide it was before.
        return [tuple(side.to(dtype) for side in (pair if self.open else self._read(pair))) for pair in gone]

    def release(self, window: Window, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Keep a smaller window from now on; returns the pairs that are no longer exact, as `append`."""
        self.window = window
        return self.append([side[:, :, :0] for side in self.view()], dtype) if self.data else []

    def _decode(self) -> None:
        """Store numbers in place of bytes from now on, which pass no gradient on: the same, in fp32."""
        states = self.view()
        last = self._read([side.narrow(2, self.size - self.spare, self.spare) for side in self.data])
        free, self.rest, self.open = self.size - self.length - self.spare, [], 1
        sides = zip(states, last, strict=True)
        self._store([torch.cat((s, s.new_zeros(*s.shape[:2], free, s.shape[3]), end), 2) for s, end in sides])

    def _encoded(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The rows of new tokens; what those of sinks leave out is kept here."""
        rows = self._rows(states)
        if first := min(self.sinks - self.first, states[0].shape[2]):
            read = self._read([side[:, :, :first] for side in rows])
            parts = [encode_rows(state[:, :, :first] - side) for state, side in zip(states, read, strict=True)]
            old = [side[:, :, : self.first] for side in self.rest] or [part[:, :, :0] for part in parts]
            self.rest = [ordinary(torch.cat(pair, 2)) for pair in zip(old, parts, strict=True)]
        return rows

    def rounded(self, states: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of new tokens as they will be read from here, ``[Hkv, B, t, D]``, with their gradient."""
        states = [state.to(dtype) for state in states]
        if not self.rows:
            return states
        first = min(self.sinks - self.first, states[0].shape[2])
        rounded = []
        for state, read in zip(states, self._read(self._rows(states)), strict=True):
            read[:, :, :first] += decode_rows(encode_rows(state[:, :, :first] - read[:, :, :first]))
            rounded.append(read + (state - state.detach()) if traced(state) else read)
        return rounded

    def _rows(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values ``[..., D]`` as rows."""
        return [encode_rows(state) for state in states] if self.units is None else self.units.encode(*states)

    def _read(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values of rows, in fp32; none where there are none yet."""
        return [decode_rows(side) for side in rows] if self.units is None or not rows else self.units.decode(*rows)

    def _parts(self, like: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of keys and of values: sinks, recent and spare tokens; ``like`` those, if there are none yet."""
        places = (0, self.first), (self.first, self.length - self.first), (self.size - self.spare, self.spare)
        data = self.data or [state[:, :, :0] for state in like]
        return [[side.narrow(2, start, count) for start, count in places] for side in data]

    def _arrange(self, sinks: Sequence[Tensor], rows: Sequence[Tensor], recent: int, size: int) -> None:
        """Hold copies of sinks and of the rows that follow them in the text: the last are recent, the others spare."""
        first, spare = sinks[0].shape[2], rows[0].shape[2] - recent
        sides = [(s, r[:, :, spare:], r[:, :, :spare]) for s, r in zip(sinks, rows, strict=True)]
        data, self.length, self.spare = self.data, first + recent, spare
        if traced(*sinks, *rows) or (data and data[0].requires_grad):  # a graph may hold on to what is stored
            return self._store([torch.cat(side, 2) for side in sides])
        if size != self.size or not data:
            data = [ordinary(side.new_empty(*side.shape[:2], size, side.shape[3])) for side in rows]
        for place, part in ((0, 0), (first, 1), (size - spare, 2)):
            self._write(data, [side[part] for side in sides], place)
        if data is not self.data:
            self._store(data)

    def _grow(self, size: int) -> None:
        """Have more free places behind the recent tokens."""
        data = [ordinary(side.new_empty(*side.shape[:2], size, side.shape[3])) for side in self.data]
        self._write(data, [side.narrow(2, 0, self.length) for side in self.data], 0)
        self._store(data)

    @staticmethod
    def _write(data: Sequence[Tensor], states: Sequence[Tensor], start: int) -> None:
        for side, state in zip(data, states, strict=True):
            side.narrow(2, start, state.shape[2]).copy_(state)

    def view(self) -> list[Tensor]:
        """Keys and values in use, ``[Hkv, B, length, D]``; those of rows in fp32."""
        held = [side.narrow(2, 0, self.length) for side in self.data]
        if not self.rows or self.open:
            return held
        states = self._read(held)
        for state, rest in zip(states, self.rest, strict=False):
            state[:, :, : self.first] += decode_rows(rest[:, :, : self.first])
        return states

    def flat(self) -> list[Tensor]:
        """Keys and values in use as products take them, ``[Hkv * B, length, D]``."""
        if self.rows and not self.open:
            return [side.flatten(0, 1) for side in self.view()]
        return [side.narrow(1, 0, self.length) for side in self._flat]

    def crop(self, remove: int) -> int:
        """Forget the last ``remove`` tokens, which are all that were not sure to stay.

        Returns how many of those that have left are to be forgotten where they went: some because they are removed,
        some because they are exact again. The recent ones go first: a crop beyond what is spare leaves fewer than the
        window, and the store fills again from there.
        """
        if not self.data:
            return 0
        end, recent = self.total - remove, self.length - self.first
        kept = max(recent - remove, 0)
        removed = min(remove - (recent - kept), self.left)
        first, spare = min(self.first, end), max(self.spare - removed, 0)
        self.rest = [side if side.shape[2] == first else side[:, :, :first].clone() for side in self.rest]
        self.left -= removed
        back = min(spare, max(self.left - coded(end, self.sinks, self.window, self.block), 0))
        self.left -= back
        size = self.places(end, self.left, spare - back)
        if removed + back == 0 and self.size == size:
            self.length = first + kept
            return 0
        parts = self._parts(())
        rows = min(size - first, spare + kept)
        last = [_last((part[2][:, :, :spare], part[1][:, :, :kept]), rows) for part in parts]
        self._arrange([part[0][:, :, :first].clone() for part in parts], last, back + kept, size)
        return removed + back

    def drop_spare(self) -> None:
        """Forget the tokens that have left for good."""
        self.spare = 0

    def __getstate__(self) -> dict:
        parts = [[part.detach().clone() for part in side] for side in (self._parts(()) if self.data else ())]
        state = {**self.__dict__, "data": parts, "_flat": [], "size": self.size}  # without what lies in free places
        state.pop("units", None)  # the layer has it
        return state

    def __setstate__(self, state: dict) -> None:
        parts, size = state["data"], state.pop("size")
        self.__dict__.update(state)
        self.rest = [side.detach().clone() for side in self.rest]
        free = size - self.length - self.spare
        sides = [(s, r, r.new_zeros(*r.shape[:2], free, r.shape[3]), spare) for s, r, spare in parts]
        self._store([torch.cat(side, 2) for side in sides])

    def __deepcopy__(self, memo) -> "ExactStore":
        twin = ExactStore.__new__(ExactStore)
        twin.__setstate__({**self.__dict__, "data": self._parts(()), "size": self.size})
        return twin

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by ``change(storage)``; the batch is dimension 1."""
        self._store([change(side).contiguous() for side in self.data])
        self.rest = [ordinary(change(side).contiguous()) for side in self.rest]

    def _store(self, data: Sequence[Tensor]) -> None:
        self.data = [ordinary(side) for side in data]
        self._flat = [side.flatten(0, 1) for side in self.data]

    def reset(self) -> None:
        self.data, self._flat, self.rest = [], [], []
        self.length, self.left, self.spare, self.open = 0, 0, 0, 0

    @property
    def nbytes(self) -> int:
        return sum(side.untyped_storage().nbytes() for side in (*self.data, *self.rest))


def _leaving(recent: Sequence[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """Copies of the first ``count`` tokens of those held and those given, as pairs of keys and values."""
    stored = min(count, recent[0][0].shape[2])
    pairs = [tuple(side[0][:, :, :stored].clone() for side in recent)] if stored else []
    if count > stored:
        pairs.append(tuple(side[1][:, :, : count - stored] for side in recent))
    return pairs


def _last(parts: Sequence[Tensor], count: int) -> Tensor:
    """A copy of the last ``count`` tokens of tensors that follow each other, ``[..., t, D]``."""
    taken = []
    for part in reversed(parts):
        kept = min(count, part.shape[2])
        taken.append(part.narrow(2, part.shape[2] - kept, kept))
        count -= kept
    return torch.cat(taken[::-1], 2)
