"""The bases that caches read their coordinates by: in 16 bits, once for all caches of an adapter on a device.

They do not depend on the text and nothing writes to them, so caches with the same allocation, and copies of a cache,
have the same tensors. They are dropped with the last cache that has them.
"""

import threading
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.kv.cache.packed import Coding, Layout
from nestling.kv.integration.modes import default_mode, ordinary
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.quantisation.rows import Units

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

SIDES = ("key", "value")
ROUNDING = 2**-10  # of the largest entry of a row: more than fp16 loses unless numbers are too large or small for it

Members = Sequence[tuple[list[int], tuple[Layout, Layout]]]  # heads that are stored alike, and how keys and values are

_shared: weakref.WeakValueDictionary[Hashable, "LayerBases"] = weakref.WeakValueDictionary()
_tokens: dict[int, tuple[weakref.ref, str]] = {}  # names of the adapters that are alive
_lock = threading.RLock()


@dataclass(frozen=True, eq=False, slots=True)
class SideBasis:
    """What keys or values of some heads are stored and read by.

    Attributes:
        encode, decode: ``[h, r, D]`` (``encode`` transposed), in the order of the layout; None at full width, where
            keys or values are kept as they are.
        coding: of the coded coordinates, if there are any.
    """

    encode: Tensor | None = None
    decode: Tensor | None = None
    coding: Coding | None = None

    @classmethod
    def of(cls, bases: Mapping[str, Tensor], side: int, heads: list[int], layout: Layout, half: bool) -> "SideBasis":
        """Of keys (side 0) or values (side 1), from the bases of a layer as `LayerBases.of` takes them."""
        name = SIDES[side]
        whole, inverse = bases[f"{name}_encode"][heads].mT, bases[f"{name}_decode"][heads]
        if len(layout.plain) == whole.shape[-1]:
            return cls()
        rounded = _fp16(whole) if half else None
        if rounded is not None:  # what is read is the inverse of what is written
            inverse = inverse if torch.equal(rounded.float(), whole) else _inverse(rounded)
        encode, decode = (_kept(matrices, layout) for matrices in (whole if rounded is None else rounded, inverse))
        if rounded is not None and (narrow := _fp16(decode)) is not None:
            decode = narrow
        if not layout.widths:
            return cls(encode, decode)
        centre = (encode[:, len(layout.plain) :].float() @ bases[f"{name}_mean"][heads, :, None])[..., 0]
        step = _padded(bases[f"{name}_step"][heads, :, None], 1.0)[:, layout.coded, 0]
        return cls(encode, decode, Coding.of(layout, centre, step))

    def rest(self, mean: Tensor, layout: Layout) -> Tensor:
        """What coordinates that are not stored, or are coded, hold of means ``[h, 1, D]``."""
        if self.encode is None or self.decode is None:
            return torch.zeros_like(mean)
        plain = len(layout.plain)
        return mean - mean @ self.encode[:, :plain].float().mT @ self.decode[:, :plain].float()

    def unstored(self, means: Tensor) -> Tensor:
        """What coordinates that are not stored hold of means ``[h, n, D]``."""
        if self.encode is None or self.decode is None:
            return torch.zeros_like(means)
        return means - means @ self.encode.float().mT @ self.decode.float()

    def __deepcopy__(self, memo: dict) -> "SideBasis":
        return self


class LayerBases:
    """The bases of one layer for an allocation; copies of a cache in this process share them.

    Attributes:
        sides: of each group of heads, those of keys and of values.
        biases: of keys and of values, the part of the mean that is not in what groups hold: ``[Hkv, 1, D]`` fp32 in
            their order. It is zero for heads at full width, and None if it is for all of them or there are no means.
        drift: by how much the bias of keys differs in each span of positions, ``[Hkv, spans, D]``, in 16 bits where
            that holds it: of coordinates that are not stored at all; see `nestling.kv.cache.drift`.
        units: of recent tokens, in that order, of adapters that quantise; see `ExactStore`. They are the same for all
            allocations, and None where nothing is compressed.
        device: where they are.
    """

    def __init__(
        self,
        sides: Sequence[Sequence[SideBasis]],
        biases: Sequence[Tensor | None],
        width: int,
        device: torch.device,
        key: Hashable = None,
        *,
        units: Units | None = None,
        drift: Tensor | None = None,
    ):
        self.sides, self.biases, self.width, self.device, self.key = sides, biases, width, device, key
        self.units, self.drift = units, drift

    @classmethod
    def of(cls, bases: Mapping[str, Tensor], members: Members, half: bool, key: Hashable = None) -> "LayerBases":
        """For groups of heads, each with the layouts of its keys and values.

        Args:
            bases: {key,value}_encode and _decode ``[Hkv, D, D]`` fp32; with {key,value}_mean ``[Hkv, D]``: what the
                coordinates that are not stored are taken to be at, and what coded ones are counted from, and
                key_drift ``[Hkv, spans, D]``; for layouts with codes also _step ``[Hkv, D]``.
            half: keep the bases in fp16 where their entries fit.
        """
        with default_mode(gradients=False):
            bases = {name: ordinary(tensor) for name, tensor in bases.items()}
            sides = [
                (SideBasis.of(bases, 0, heads, pair[0], half), SideBasis.of(bases, 1, heads, pair[1], half))
                for heads, pair in members
            ]
            biases: list[Tensor | None] = [None, None]
            for number, name in enumerate(SIDES):
                mean = bases.get(f"{name}_mean")
                if mean is not None and any(pair[number].encode is not None for pair in sides):
                    parts = zip(sides, members, strict=True)
                    rests = [pair[number].rest(mean[h, None], layouts[number]) for pair, (h, layouts) in parts]
                    biases[number] = torch.cat(rests)
            encode, units = bases["key_encode"], None
            compressed = any(side.encode is not None for pair in sides for side in pair)
            if compressed and "key_mean" in bases and "key_step" in bases:
                order = [head for heads, _ in members for head in heads]
                variances = [_variance(bases[f"{name}_decode"], bases[f"{name}_step"])[order] for name in SIDES]
                units = Units.of(bases["key_mean"][order], variances)
            drift = _unstored(bases.get("key_drift"), sides, members)
            if half and drift is not None and torch.isfinite(narrow := drift.half()).all():
                drift = narrow
            return cls(sides, biases, encode.shape[-1], encode.device, key, units=units, drift=drift)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        sides = [side for pair in self.sides for side in pair]
        codings = [side.coding for side in sides if side.coding is not None]
        tensors = [t for side in sides for t in (side.encode, side.decode)]
        tensors += [t for coding in codings for t in (coding.centre, coding.step, coding.scale, coding.offset)]
        tensors += self.units.tensors() if self.units is not None else ()
        return [tensor for tensor in (*tensors, *self.biases, self.drift) if tensor is not None]

    def __deepcopy__(self, memo: dict) -> "LayerBases":
        return self

    def __reduce__(self):
        sides = [[_state(side) for side in pair] for pair in self.sides]
        units = None if self.units is None else self.units.tensors()
        return _revived, (self.key, sides, self.biases, self.width, self.device, units, self.drift)


def nbytes(bases: Iterable[LayerBases]) -> int:
    """Bytes of their storages."""
    tensors = [tensor for layer in bases for tensor in layer.tensors()]
    storages = {(str(t.device), t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def shared(adapter: "KVAdapter", row: int, members: Members, device: torch.device, half: bool) -> LayerBases:
    """The bases of a compressed layer, by its row in the adapter: those in use, if there are any."""
    kept = adapter._layer_bases(row)
    versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in kept.values())
    layouts = tuple((tuple(heads), pair) for heads, pair in members)
    key = (_token(adapter), row, versions, layouts, half)

    def make() -> LayerBases:
        return LayerBases.of({name: tensor.to(device) for name, tensor in kept.items()}, members, half, key)

    return _registered(key, device, make)


def _registered(key: Hashable, device: torch.device, make: Callable[[], LayerBases]) -> LayerBases:
    with _lock:
        bases = _shared.get((key, str(device)))
        if bases is None:
            bases = _shared[key, str(device)] = make()
        return bases


def _token(adapter: "KVAdapter") -> str:
    """A name that no other adapter has had or will have, in this process or another."""
    with _lock:
        entry = _tokens.get(id(adapter))
        if entry is None or entry[0]() is not adapter:
            number = id(adapter)
            entry = _tokens[number] = weakref.ref(adapter, lambda ref: _forget(number, ref)), uuid.uuid4().hex
        return entry[1]


def _forget(number: int, ref: weakref.ref) -> None:
    if number in _tokens and _tokens[number][0] is ref:
        del _tokens[number]


def _state(side: SideBasis) -> tuple[Any, ...]:
    coding = side.coding
    parts = None if coding is None else (coding.centre, coding.step, coding.scale, coding.offset)
    return side.encode, side.decode, parts


def _revived(
    key: Hashable, states: list, biases: list, width: int, device: torch.device,
    units: tuple[Tensor, ...] | None, drift: Tensor | None,
) -> LayerBases:  # fmt: skip
    """From a file or another process; the same ones as those in use here, if they came from here."""

    def tensor(value: Tensor | None) -> Tensor | None:
        return None if value is None else ordinary(value)

    def side(encode: Tensor | None, decode: Tensor | None, parts: tuple[Tensor, ...] | None) -> SideBasis:
        return SideBasis(tensor(encode), tensor(decode), None if parts is None else Coding(*map(ordinary, parts)))

    sides = [[side(*state) for state in pair] for pair in states]
    device = next((s.encode.device for pair in sides for s in pair if s.encode is not None), device)
    measured = None if units is None else Units(*map(ordinary, units))
    biases = [tensor(bias) for bias in biases]
    bases = LayerBases(sides, biases, width, device, key, units=measured, drift=tensor(drift))
    return bases if key is None else _registered(key, device, lambda: bases)


def _unstored(drift: Tensor | None, sides: Sequence[Sequence[SideBasis]], members: Members) -> Tensor | None:
    """Of ``[Hkv, spans, D]``, in the order of the groups, what is not stored; None where everything is."""
    if drift is None or all(pair[0].encode is None for pair in sides):
        return None
    return torch.cat([pair[0].unstored(drift[heads]) for pair, (heads, _) in zip(sides, members, strict=True)])


def _variance(decode: Tensor, step: Tensor) -> Tensor:
    """Of keys or values ``[Hkv, D]``, up to a factor: steps are in proportion to what coordinates vary by."""
    return (decode * step[..., None]).square().sum(1)


def _fp16(matrices: Tensor) -> Tensor | None:
    """Rounded to fp16, or None where the entries of a row are too large or too small for it."""
    rounded = matrices.half()
    off = (rounded.float() - matrices).abs().amax(-1)
    return rounded if bool((off <= ROUNDING * matrices.abs().amax(-1)).all()) else None


def _inverse(encode: Tensor) -> Tensor:
    """Of ``encode`` transposed, fp32."""
    return torch.linalg.inv(encode.double().mT).float()


def _kept(matrices: Tensor, layout: Layout) -> Tensor:
    """The rows of ``[h, D, n]`` that a layout keeps, in its order: a copy, so that the full width can be freed."""
    kept = torch.tensor([*layout.plain, *layout.coded], dtype=torch.int64, device=matrices.device)
    return _padded(matrices, 0.0).index_select(1, kept)


def _padded(matrices: Tensor, value: float) -> Tensor:
    """``[h, D, n]`` with more rows, to whole blocks of coordinates."""
    missing = -matrices.shape[1] % COORDINATES_PER_BLOCK
    return torch.nn.functional.pad(matrices, (0, 0, 0, missing), value=value) if missing else matrices
