"""Storage that grows with the tokens of a text: coordinates of some heads, in place, by an eighth at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.kv.cache.matmul import cast, product, product_into
from nestling.kv.integration.modes import ordinary, traced

MULTIPLE = 16  # tokens: what kernels read at once, and what leaves the exact store at once
GROWTH = 8  # storage grows by one part in so many


def room(tokens: int, until: int = 0) -> int:
    """Tokens that storage has places for when it holds ``tokens``: up to an eighth more, by multiples of `MULTIPLE`.

    It depends on the number of tokens alone, not on how they came or went.

    Args:
        until: a number of tokens at which a budget has to be met: there is no room for more before they are there.
    """
    places = 0
    while places < tokens:
        places += max(MULTIPLE, places // (GROWTH * MULTIPLE) * MULTIPLE)
    until = MULTIPLE * -(-until // MULTIPLE)
    return until if tokens <= until < places else places


class Buffer:
    """Coordinates of tokens that grow in place: ``[h, B, w, capacity]``, of which the first ``length`` are in use.

    The capacity is `room` for them. Appending writes in place, but not where a graph is built: there, storage is made
    anew for every call, as transformers' own caches do. A coordinate of all tokens is a row: for the few queries
    of a decode step, products with such storage read up to twice as many bytes per second. The tensor is compact in w:
    no slice of a wider tensor, which would keep the full width alive.

    ``by_token=True`` stores ``[h, B, capacity, w]`` instead, which is what SDPA reads. ``until``: see `room`.
    """

    def __init__(self, until: int = 0, by_token: bool = False):
        self.until, self.dim = until, 2 if by_token else 3
        self.data: Tensor | None = None
        self._flat: Tensor | None = None  # the same memory
        self.length = 0

    def append(self, new: Tensor, dtype: torch.dtype) -> None:
        """Add t tokens, ``[h, B, w, t]`` or, by token, ``[h, B, t, w]``."""
        count = new.shape[self.dim]
        end = self.length + count
        if traced(new, self.data) or (self.data is not None and self.data.requires_grad):
            self._store(torch.cat([*([self.view()] if self.length else []), new.to(dtype)], self.dim))
            self.length = end
            return
        if self.data is None or end > self.data.shape[self.dim]:
            shape = list(new.shape)
            shape[self.dim] = room(end, self.until)
            grown = new.new_empty(shape, dtype=dtype)
            if self.length:
                grown.narrow(self.dim, 0, self.length).copy_(self.view())
            self._store(grown)
        assert self.data is not None
        self.data.narrow(self.dim, self.length, count).copy_(new)
        self.length = end

    def __getstate__(self) -> dict:
        states = None if self.data is None else self.view().detach().clone()  # and not what lies behind it in memory
        return {**self.__dict__, "data": states, "_flat": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if (states := state["data"]) is not None:
            shape = list(states.shape)
            shape[self.dim] = room(self.length, self.until) - self.length
            self._store(torch.cat((states, states.new_zeros(shape)), self.dim))

    def __deepcopy__(self, memo) -> "Buffer":
        states, twin = None if self.data is None else self.view(), Buffer.__new__(Buffer)
        twin.__setstate__({**self.__dict__, "data": states})
        return twin

    def view(self) -> Tensor:
        """The tokens in use, ``[h, B, w, length]`` or, by token, ``[h, B, length, w]``."""
        assert self.data is not None, "nothing was appended"
        return self.data.narrow(self.dim, 0, self.length)

    def flat(self) -> Tensor:
        """The tokens in use as products take them, ``[h * B, w, length]`` or, by token, ``[h * B, length, w]``."""
        assert self._flat is not None, "nothing was appended"
        return self._flat.narrow(self.dim - 1, 0, self.length)

    def whole(self) -> Tensor:
        """All of the storage as ``[h * B, w, capacity]``, contiguous; not for storage by token."""
        assert self._flat is not None, "nothing was appended"
        return self._flat

    def score(self, rows: Tensor, into: Tensor, scaling: float) -> None:
        """``scaling * rows @ coordinates``: of ``[h * B, n, w]`` into ``[h * B, n, length]``."""
        product_into(into, rows, cast(self.flat(), rows.dtype), alpha=scaling)

    def weighted(self, weight: Tensor) -> Tensor:
        """The sums of coordinates with weights ``[h * B, n, length]``: ``[h * B, n, w]``."""
        return product(weight, cast(self.flat(), weight.dtype).mT)

    def coordinates(self, dtype: torch.dtype) -> Tensor:
        """What is held, ``[h, B, length, w]``."""
        return (self.view() if self.dim == 2 else self.view().mT).to(dtype)

    def _store(self, data: Tensor) -> None:
        self.data = ordinary(data)
        self._flat = self.data.flatten(0, 1)

    def select(self, places: Tensor) -> None:
        """Keep the tokens at ``places`` ``[h, B, k]`` alone, in storage that fits them."""
        view, dtype = self.view(), self.view().dtype
        index = places.unsqueeze(5 - self.dim)
        index = index.expand(*[view.shape[d] if d == 5 - self.dim else index.shape[d] for d in range(4)])
        kept = view.gather(self.dim, index)
        self.reset()
        self.append(kept, dtype)

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens, and give back the storage that is not needed any more."""
        self.length -= remove
        if not traced(self.data) and room(self.length, self.until) < self._capacity:
            self.apply(lambda storage: storage)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by ``change(storage)``: batch selection (dimension 1), repetition, another device."""
        if self.data is not None:
            places = min(room(self.length, self.until), self._capacity)
            data = change(self.data.narrow(self.dim, 0, places)).contiguous()
            self._store(data.clone() if data.nbytes < data.untyped_storage().nbytes() else data)

    @property
    def _capacity(self) -> int:
        return 0 if self.data is None else self.data.shape[self.dim]

    def reset(self) -> None:
        self.data, self._flat, self.length = None, None, 0

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.untyped_storage().nbytes()
