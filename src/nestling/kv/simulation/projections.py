"""What is read of keys and values that are cut to ranks or bits, by masks, with gradients by the bases.

Nothing is stored smaller here: every key and value is projected onto its coordinates and back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.basis import Cayley
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.allocation.table import by_coordinate
from nestling.kv.cache.drift import Means
from nestling.kv.cache.rule import SKIP, coded
from nestling.kv.integration.attach import PassThroughLayer, sdpa
from nestling.kv.quantisation import quantiser as quantise
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK

QUERY_BLOCK = 256  # queries at a time beside an exact window: what lies ahead of them or out of the window is left out


class MaskedLayer(PassThroughLayer):
    """Hands keys, values and what is to be done with them to the attention function."""

    def __init__(self, masked: "Masked"):
        super().__init__()
        self.masked = masked

    def update(self, key_states, value_states, *args, **kwargs):
        self.states = (key_states, value_states)
        return self, self

    def attend(self, module, query, mask, **kwargs):
        return self.masked.attend(module, query, *self.states, mask, **kwargs)


class MaskedBases(nn.Module):
    """Trainable rotations on an adapter's bases, ``[2, L, Hkv, D, D]`` (keys, values), and masks on coordinates.

    Coordinates are ``x @ encode @ U`` with ``U = Cayley(X)``, X = 0 at the start (arXiv 2410.14731, section 3.2, on
    top of any basis). fp32, whatever autocast says.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    drift: Tensor | None
    free: Tensor

    def __init__(self, adapter: KVAdapter):
        super().__init__()
        for name in ("encode", "decode", "mean"):
            tensors = getattr(adapter, name)
            self.register_buffer(name, torch.stack([tensors[s] for s in SIDES]).float(), persistent=False)
        self.register_buffer("drift", adapter.drift, persistent=False)
        self.rotation = Cayley(*self.encode.shape)
        # Coordinates of one step are kept or dropped together. To rotate them among each other changes nothing, but
        # Adam would scale the rounding errors of those gradients up to full steps.
        block = torch.arange(self.encode.shape[-1]) // COORDINATES_PER_BLOCK
        self.register_buffer("free", block[:, None] != block, persistent=False)
        self.rotation.x.register_hook(lambda gradient: gradient * self.free)

    def cut(self, bits: Tensor) -> "Projected | Coded":
        """What is read at bits of blocks ``[B, 2, L, Hkv, blocks]``: where all are 0 or 16, by projections."""
        bits = by_coordinate(bits, self.encode.shape[-1])
        return self.coded(bits) if ((bits > 0) & (bits < FULL_BITS)).any() else self.projected(bits > 0)

    def projected(self, mask: Tensor) -> "Projected":
        """Projections ``encode U mask U^T decode`` for masks of coordinates ``[B, 2, L, Hkv, D]``."""
        with torch.autocast(self.encode.device.type, enabled=False):
            u = self.rotation()
            projectors = (self.encode @ u * mask[..., None, :]) @ (u.mT @ self.decode)
            full = mask.all(-1)[..., None, None]  # the identity, without a gradient
            eye = torch.eye(mask.shape[-1], device=u.device, dtype=u.dtype)
            return Projected(self.means, torch.where(full, eye, projectors))

    def weighted(self, mask: Tensor) -> "Projected":
        """The same for a weight of each coordinate, ``[B, 2, L, Hkv, D]``, of the bases as they were given."""
        return Projected(self.means, (self.encode * mask[..., None, :]) @ self.decode)

    def coded(self, bits: Tensor) -> "Coded":
        """Quantised coordinates, for their bits ``[B, 2, L, Hkv, D]``."""
        with torch.autocast(self.encode.device.type, enabled=False):
            u = self.rotation()
            return Coded(self.encode @ u, u.mT @ self.decode, self.means, bits)

    @property
    def means(self) -> Means:
        """Of keys and values, by position."""
        return Means(self.mean, self.drift)

    @torch.no_grad()
    def encodes(self) -> dict[str, Tensor]:
        """The bases as trained so far, fp32 ``[L, Hkv, D, D]`` by side; the rotations are computed in fp64."""
        a = (self.rotation.x - self.rotation.x.mT).double() / 2
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        encode = self.encode.double() @ torch.linalg.solve(eye - a, eye + a)
        return {side: e.float().cpu() for side, e in zip(SIDES, encode, strict=True)}


@dataclass
class Projected:
    """Keys and values with the coordinates beyond the rank at their mean.

    Attributes:
        means: of keys and values.
        projectors: ``[B, 2, L, Hkv, D, D]``.
    """

    means: Means
    projectors: Tensor

    def __call__(self, states: Tensor, side: int, row: int, positions: Tensor) -> Tensor:
        """Keys (side 0) or values (side 1) of a layer, ``[B, Hkv, T, D]``, of tokens at ``positions`` ``[T]``."""
        projector = self.projectors[:, side, row]
        means, spans = self.means.by_span(side, row, positions)
        offset = means.to(projector) - means.to(projector) @ projector  # outside of the kept coordinates
        return states @ projector.to(states) + offset.to(states).index_select(2, spans)


@dataclass
class Coded:
    """Keys and values as they are read from quantised coordinates.

    Attributes:
        encode, decode: the bases as trained so far, ``[2, L, Hkv, D, D]``.
        means: of keys and values.
        bits: of each coordinate, ``[B, 2, L, Hkv, D]``.
    """

    encode: Tensor
    decode: Tensor
    means: Means
    bits: Tensor

    def __call__(self, states: Tensor, side: int, row: int, positions: Tensor) -> Tensor:
        """Keys or values of a layer, as above; heads that lose nothing are left alone."""
        bits = self.bits[:, side, row, :, None].to(states.device)
        mean, encode, decode = (
            part[side, row].to(states.device) for part in (self.means.mean, self.encode, self.decode)
        )
        mean = mean[:, None]
        means, spans = self.means.by_span(side, row, positions)
        with torch.autocast(states.device.type, enabled=False):
            z = (states.float() - mean) @ encode
            most = z[:, :, SKIP:] if z.shape[2] > SKIP else z
            rms = most.square().mean(2, keepdim=True).clamp_min(1e-20).sqrt()
            dropped = ((means - mean) @ encode).index_select(1, spans)
            cut = mean + torch.where(bits == 0, dropped, quantise.fake_quantise(z, bits, rms)) @ decode
        return torch.where((bits == 16).all(-1, keepdim=True), states, cut.to(states.dtype))


@dataclass
class Masked:
    """What the attention function is given in a student's forward: cuts keys and values of the layers it serves.

    Attributes:
        rows: the row of ``cut`` of each layer index.
        cut: what is read of keys or values: of (states ``[B, Hkv, T, D]``, side, row, positions ``[T]``).
        sinks, window: leading tokens, and most recent ones of every query, that are read exact as in `ExactStore`.
        served: layer indices that came by: a model that drops the argument on its way would train nothing.
        watch: are shown keys or values and what is read of them: (side, row, states, cut, positions), both
            ``[B, Hkv, T, D]``.
        positions: of the tokens, ``[T]``, where they are not in a row from 0 on.
    """

    rows: dict[int, int]
    cut: Callable[[Tensor, int, int, Tensor], Tensor]
    sinks: int
    window: int
    served: set[int]
    watch: Sequence[Callable[[int, int, Tensor, Tensor, Tensor], None]] = ()
    positions: Tensor | None = None

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]`` of a whole text without padding, causal."""
        row = self.rows.get(module.layer_idx)
        kwargs["dropout"] = 0.0  # as in `Student.train`
        if row is None:
            return sdpa(module, query, key, value, mask, **kwargs)
        self.served.add(module.layer_idx)
        cut = [self._read(x, side, row) for side, x in enumerate((key, value))]
        if not self.sinks and not self.window:
            return sdpa(module, query, cut[0], cut[1], mask, **kwargs)
        blocks = range(0, query.shape[2], QUERY_BLOCK)
        return torch.cat([self._block(module, query, (key, value), cut, start, **kwargs) for start in blocks], 1)

    def _read(self, states: Tensor, side: int, row: int) -> Tensor:
        positions = torch.arange(states.shape[2]) if self.positions is None else self.positions
        positions = (positions.to(states.device) - self.sinks).clamp_(min=0)  # as a cache counts spans
        cut = self.cut(states, side, row, positions)
        for watcher in self.watch:
            watcher(side, row, states, cut, positions)
        return cut

    def _block(self, module, query: Tensor, exact, cut, start: int, **kwargs) -> Tensor:
        """Queries from ``start`` on: every token behind them is read once, exact or cut."""
        query = query[:, :, start : start + QUERY_BLOCK]
        stop, device = start + query.shape[2], query.device
        i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
        gone = coded(i + 1, self.sinks, self.window)  # these many after the sinks are compressed when i is read
        seen, is_exact = j <= i, (j < self.sinks) | (j >= self.sinks + gone)
        near = torch.cat((j[: self.sinks], j[self.sinks + coded(start + 1, self.sinks, self.window) :]))
        mask = torch.cat(((seen & is_exact)[:, near], seen & ~is_exact), 1)
        keys, values = (torch.cat((e[:, :, near], c[:, :, :stop]), 2) for e, c in zip(exact, cut, strict=True))
        return sdpa(module, query, keys, values, mask[None, None], **kwargs)
