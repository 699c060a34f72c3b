"""What is done with the storage of a cache as a whole: rows of the batch, devices, bytes, copies, files."""

import copy
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nestling.kv.integration.modes import restore


class StoredLayer(CacheLayerMixin):
    """A layer whose keys and values are in parts of its own, ``[heads, B, ...]`` each; see `NestedLayer`."""

    dtype: torch.dtype
    device: torch.device
    length: int

    def __init__(self) -> None:  # the base class would set keys and values
        self.is_initialized = False
        self._shape: tuple[int, int, int] | None = None  # batch, heads, width

    def __setstate__(self, state: dict) -> None:
        restore(self, state)

    def expand(self, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of all tokens held, decoded, ``[B, Hkv, T, D]``."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of all tokens held, decoded, ``[B, Hkv, T, D]``; None while there are none."""
        return self.expand(self.dtype)[0] if self.length else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values, as `keys`."""
        return self.expand(self.dtype)[1] if self.length else None

    def _parts(self) -> list:
        """All that stores something."""
        raise NotImplementedError

    def _apply(self, change: Callable[[Tensor], Tensor], batch: int | None = None) -> None:
        """Replace every stored tensor, ``[heads, B, ...]``."""
        for part in self._parts():
            part.apply(change)
        if batch is not None and self._shape is not None:
            self._shape = (batch, *self._shape[1:])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(1, beam_idx.to(t.device)), len(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._shape is not None:
            self._apply(lambda t: t.repeat_interleave(repeats, 1), self._shape[0] * repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._shape is not None:
            self._apply(lambda t: t[:, indices], len(torch.arange(self._shape[0])[indices.cpu()]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts())

    @property
    def full_elements(self) -> int:
        """Elements of full keys and values for the tokens and batch held."""
        batch, heads, width = self._shape or (0, 0, 0)
        return 2 * batch * heads * self.length * width

    @property
    def batch(self) -> int:
        """Texts held."""
        return self._shape[0] if self._shape else 0


class StoredCache(Cache):
    """A cache that can be iterated, copied and pickled, and knows its bytes; see `NestedCache`.

    Attributes:
        model: a weak reference to the model it was made for, unless it comes from a file.
    """

    model: weakref.ref | None = None

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        """Keys and values of each layer as transformers' own caches give them: those of nested layers are decoded."""
        for layer in self.layers:
            yield tuple(getattr(layer, name, None) for name in ("keys", "values", "_sliding_window_tensor"))

    def __getstate__(self) -> dict:
        """All but what belongs to this process: the model is known again by its weights (`integration.owner`)."""
        return {name: value for name, value in self.__dict__.items() if name != "model"}

    def __setstate__(self, state: dict) -> None:
        self.model = None
        self.__dict__.update(state)

    def __deepcopy__(self, memo) -> "StoredCache":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.model = self.model
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of storage really held, by all layers: untyped storages, so slack and exact tokens are included.

        Bases are not: see `shared_nbytes`.
        """
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that a stock cache of the stored dtype would hold for the same tokens and batch, without slack."""
        return sum(_layer_full_nbytes(layer) for layer in self.layers)

    @property
    def share(self) -> float:
        """What is held, of the bytes of a full cache of the stored dtype; 0 while nothing is."""
        return self.nbytes / self.full_nbytes if self.full_nbytes else 0.0


def _stored(layer) -> list[Tensor]:
    """Keys and values of a stock layer, if it has any yet."""
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


def _layer_nbytes(layer) -> int:
    if isinstance(layer, StoredLayer):
        return layer.nbytes
    return sum(t.untyped_storage().nbytes() for t in _stored(layer))


def _layer_full_nbytes(layer) -> int:
    """Bytes that a stock layer would hold for the same tokens."""
    if isinstance(layer, StoredLayer):
        return layer.full_elements * layer.dtype.itemsize if layer.length else 0
    return sum(t.nbytes for t in _stored(layer))
