"""Rank groups: the unit of storage of a nested cache. Some heads of one layer and their coordinates.

A group encodes and appends the tokens that are given to it, and reads what it holds. Storage has the heads first, so
that in tensors of a whole layer a group is a slice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestling.kv.cache.buffer import Buffer
from nestling.kv.cache.matmul import cast, product, product_into, work_dtype
from nestling.kv.cache.packed import ALL, Layout, PackedRows
from nestling.kv.integration.modes import restore
from nestling.kv.quantisation.packing import BLOCK

SIDES = ("key", "value")


class RankGroup:
    """The KV heads of one layer that share a layout of keys and one of values.

    ``heads`` in the model's order; in tensors of the layer they are at ``start`` and the following places.
    ``encode``, transposed, and ``decode``: ``[h, r, D]`` of keys and of values, in the order of the layouts. None at
    full width, where keys or values are kept as they are.
    """

    def __init__(
        self,
        heads: list[int],
        start: int,
        bases: dict[str, Tensor],
        layouts: tuple[Layout, Layout],
        chunk: int,
        by_token: bool = False,
        present: "RankGroup | None" = None,
    ):
        """``bases``: of the layer, {key,value}_encode and _decode ``[Hkv, D, D]``; for layouts with codes also
        {key,value}_mean and _step ``[Hkv, D]``.

        A side that a ``present`` group of the same heads stores alike is its own, with all that it holds.
        """
        self.heads, self.start, self.stop = heads, start, start + len(heads)
        self.layouts, self.chunk, self.width = layouts, chunk, bases["key_encode"].shape[-1]
        self.device = bases["key_encode"].device
        self.encode: list[Tensor | None] = []
        self.decode: list[Tensor | None] = []
        self.rows: list[Buffer | PackedRows] = []
        for side in (0, 1):
            if present is not None and present.stores(side, heads, layouts, by_token):
                encode, decode, rows = present.encode[side], present.decode[side], present.rows[side]
            else:
                encode, decode, rows = self._side(bases, side, by_token)
            self.encode.append(encode)
            self.decode.append(decode)
            self.rows.append(rows)

    def stores(self, side: int, heads: list[int], layouts: Sequence[Layout], by_token: bool) -> bool:
        """Whether keys (side 0) or values (side 1) of these heads are stored here, in this way."""
        rows = self.rows[side]
        return self.heads == heads and self.layouts[side] == layouts[side] and (rows.dim == 2) == by_token

    def _side(
        self, bases: dict[str, Tensor], side: int, by_token: bool
    ) -> tuple[Tensor | None, Tensor | None, Buffer | PackedRows]:
        """Bases and empty storage of keys (side 0) or values (side 1)."""
        layout, name = self.layouts[side], SIDES[side]
        encode = _rows_of(bases[f"{name}_encode"].mT, self.heads, layout)
        decode = _rows_of(bases[f"{name}_decode"], self.heads, layout)
        if not layout.widths:
            return encode, decode, Buffer(self.chunk, by_token)
        assert encode is not None, "a coded side is never at full width"
        centre = (encode[:, len(layout.plain) :] @ bases[f"{name}_mean"][self.heads, :, None])[..., 0]
        step = _padded(bases[f"{name}_step"][self.heads, :, None], 1.0)[:, layout.coded, 0]
        return encode, decode, PackedRows(layout, centre, step, self.chunk)

    def __setstate__(self, state: dict) -> None:
        restore(self, state)
        stored = [getattr(rows, "data", None) for rows in self.rows]
        if held := [tensor for tensor in (*self.encode, *stored) if tensor is not None]:
            self.device = held[0].device  # a file may be read onto another device

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.rows[0].length

    def append(self, states: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Store keys and values of the layer ``[Hkv, B, t, D]``, as far as they are of this group's heads."""
        for side, state in enumerate(states):
            self.append_side(side, state[self.start : self.stop], dtype)

    def append_side(self, side: int, state: Tensor, dtype: torch.dtype) -> None:
        """Store keys (side 0) or values (side 1) of the group's heads, ``[h, B, t, D]``."""
        rows = self.rows[side]
        if self.encode[side] is None:
            rows.append(state if rows.dim == 2 else state.mT, dtype)
        else:
            rows.append(self.coordinates(side, state), dtype)

    def coordinates(self, side: int, state: Tensor, slots: slice = ALL) -> Tensor:
        """The coordinates kept of keys or values ``[h, B, t, D]`` of the heads at some slots: ``[h, B, r, t]``."""
        encode = self.encode[side]
        assert encode is not None, "keys or values are kept as they are"
        heads, batch, count, width = state.shape
        work = work_dtype(state.device, state.dtype)
        columns = state.to(work).reshape(heads, batch * count, width).mT
        found = product(encode[slots].to(work), columns)
        return found.view(heads, encode.shape[1], batch, count).transpose(1, 2)

    def score(self, query: Tensor, batch: int, scaling: float, into: Tensor) -> None:
        """Logits of the tokens held, ``(q D_k^T) k'^T``: of ``query`` ``[Hkv * B, n, D]`` into ``[Hkv * B, n, T]``."""
        rows, decode = self._part(query, batch), self.decode[0]
        if decode is None:
            pass
        elif batch == 1:  # as D_k q^T: products are faster with a left side that lies transposed
            rows = product(cast(decode, rows.dtype), rows.mT).mT
        else:
            rows = _by_head(rows, cast(decode, rows.dtype).mT)
        self.rows[0].score(rows, self._part(into, batch), scaling)

    def add_output(self, weight: Tensor, batch: int, out: Tensor) -> None:
        """Add ``(w v') D_v`` of the tokens held: of weights ``[Hkv * B, n, T]`` to ``out`` ``[Hkv * B, n, D]``."""
        decode, out = self.decode[1], self._part(out, batch)
        rows = self.rows[1].weighted(self._part(weight, batch))
        if decode is None:
            out += rows
        elif batch == 1:
            product_into(out, rows, cast(decode, rows.dtype), beta=1)
        else:
            out += _by_head(rows, cast(decode, rows.dtype))

    def _part(self, rows: Tensor, batch: int) -> Tensor:
        """This group's heads of ``[Hkv * B, ...]``."""
        count = (self.stop - self.start) * batch
        return rows if rows.shape[0] == count else rows.narrow(0, self.start * batch, count)

    def expand(self, side: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Keys (side 0) or values (side 1) of the tokens held, decoded, ``[h, B, T, D]``; ``bias`` of the layer."""
        decode = self.decode[side]
        if decode is None:
            return self.rows[side].coordinates(dtype)
        work = work_dtype(decode.device, dtype)
        states = self.rows[side].coordinates(work) @ decode[:, None].to(work)
        return (states if bias is None else states + bias[self.start : self.stop, None].to(work)).to(dtype)

    def select(self, places: Tensor) -> None:
        """Keep the tokens at ``places`` ``[Hkv, B, k]`` of the layer alone."""
        for rows in self.rows:
            rows.select(places[self.start : self.stop])

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens held."""
        for rows in self.rows:
            rows.crop(remove)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every stored tensor."""
        for rows in self.rows:
            rows.apply(change)

    def reset(self) -> None:
        for rows in self.rows:
            rows.reset()

    def basis_tensors(self) -> list[Tensor | None]:
        """Bases, and steps and means of quantisers."""
        coded = [rows for rows in self.rows if isinstance(rows, PackedRows)]
        return [*self.encode, *self.decode, *(t for r in coded for t in (r.centre, r.step, r.scale, r.offset))]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


def shared_biases(groups: list[RankGroup], bases: dict[str, Tensor]) -> list[Tensor | None]:
    """Of keys and of values, the part of the mean that is not in what groups hold: ``[Hkv, 1, D]`` in their order.

    It is zero for heads at full width, and None if it is for all of them. ``bases`` may hold {key,value}_mean
    ``[Hkv, D]``: what the coordinates that are not stored are taken to be at, and what coded ones are counted from.
    """
    found: list[Tensor | None] = []
    for side, name in enumerate(SIDES):
        mean = bases.get(f"{name}_mean")
        if mean is None or all(group.encode[side] is None for group in groups):
            found.append(None)
        else:
            found.append(torch.cat([_rest(mean[group.heads, None], group, side) for group in groups]))
    return found


def _by_head(rows: Tensor, basis: Tensor) -> Tensor:
    """Each head's ``rows @ basis``: ``[h * B, n, a]`` and ``[h, a, b]`` to ``[h * B, n, b]``."""
    heads, inner, outer = basis.shape
    return product(rows.reshape(heads, rows.shape[0] // heads * rows.shape[1], inner), basis).view(
        *rows.shape[:2], outer
    )


def _rest(mean: Tensor, group: RankGroup, side: int) -> Tensor:
    """What coordinates that a group does not store, or codes, hold of means ``[h, 1, D]``."""
    encode, decode, plain = group.encode[side], group.decode[side], len(group.layouts[side].plain)
    if encode is None or decode is None:
        return torch.zeros_like(mean)
    return mean - mean @ encode[:, :plain].mT @ decode[:, :plain]


def _rows_of(matrices: Tensor, heads: list[int], layout: Layout) -> Tensor | None:
    """The rows of some heads' matrices that a layout keeps, in its order; None if all are kept as they are."""
    if len(layout.plain) == matrices.shape[-1]:
        return None
    kept = torch.tensor([*layout.plain, *layout.coded], dtype=torch.int64, device=matrices.device)
    return _padded(matrices[heads], 0.0).index_select(1, kept)  # a copy, so that the full width can be freed


def _padded(matrices: Tensor, value: float) -> Tensor:
    """``[h, D, n]`` with more rows, to whole blocks of coordinates."""
    missing = -matrices.shape[1] % BLOCK
    return torch.nn.functional.pad(matrices, (0, 0, 0, missing), value=value) if missing else matrices
