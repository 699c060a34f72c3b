"""Rank groups: the unit of storage of a nested cache. Some heads of one layer and their coordinates.

A group encodes and appends the tokens that are given to it, and reads what it holds. Storage has the heads first, so
that in tensors of a whole layer a group is a slice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestling.kv.cache.bases import SideBasis
from nestling.kv.cache.buffer import Buffer
from nestling.kv.cache.matmul import cast, product, product_into, work_dtype
from nestling.kv.cache.packed import ALL, Layout, PackedRows


class RankGroup:
    """The KV heads of one layer that share a layout of keys and one of values.

    ``heads`` in the model's order; in tensors of the layer they are at ``start`` and the following places.
    """

    def __init__(
        self,
        heads: list[int],
        start: int,
        bases: Sequence[SideBasis],
        layouts: tuple[Layout, Layout],
        *,
        until: int = 0,
        by_token: bool = False,
        present: "RankGroup | None" = None,
    ):
        """``bases``: of keys and of values. ``until``: see `nestling.kv.cache.buffer.room`.

        A side that a ``present`` group of the same heads stores alike is its own, with all that it holds.
        """
        self.heads, self.start, self.stop = heads, start, start + len(heads)
        self.layouts = layouts
        self.rows: list[Buffer | PackedRows] = []
        for side, (layout, basis) in enumerate(zip(layouts, bases, strict=True)):
            if present is not None and present.stores(side, heads, layouts, by_token):
                self.rows.append(present.rows[side])
            elif basis.coding is not None:
                self.rows.append(PackedRows(layout, basis.coding, until))
            else:
                self.rows.append(Buffer(until, by_token))
        self.use(bases)

    def use(self, bases: Sequence[SideBasis]) -> None:
        """Store and read by the bases of an equal group."""
        self.bases = bases
        for rows, basis in zip(self.rows, bases, strict=True):
            if isinstance(rows, PackedRows) and basis.coding is not None:
                rows.coding = basis.coding

    def __getstate__(self) -> dict:
        """All but the bases, which the layer has: see `NestedLayer`."""
        return {**self.__dict__, "bases": ()}

    def stores(self, side: int, heads: list[int], layouts: Sequence[Layout], by_token: bool) -> bool:
        """Whether keys (side 0) or values (side 1) of these heads are stored here, in this way."""
        rows = self.rows[side]
        return self.heads == heads and self.layouts[side] == layouts[side] and (rows.dim == 2) == by_token

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
        if self.bases[side].encode is None:
            rows.append(state if rows.dim == 2 else state.mT, dtype)
        else:
            rows.append(self.coordinates(side, state), dtype)

    def coordinates(self, side: int, state: Tensor, slots: slice = ALL) -> Tensor:
        """The coordinates kept of keys or values ``[h, B, t, D]`` of the heads at some slots: ``[h, B, r, t]``."""
        encode = self.bases[side].encode
        assert encode is not None, "keys or values are kept as they are"
        heads, batch, count, width = state.shape
        work = work_dtype(state.device, state.dtype)
        columns = state.to(work).reshape(heads, batch * count, width).mT
        kept = product(encode[slots].to(work), columns)
        return kept.view(heads, encode.shape[1], batch, count).transpose(1, 2)

    def score(self, query: Tensor, batch: int, scaling: float, into: Tensor) -> None:
        """Logits of the tokens held, ``(q D_k^T) k'^T``: of ``query`` ``[Hkv * B, n, D]`` into ``[Hkv * B, n, T]``."""
        rows, decode = self._part(query, batch), self.bases[0].decode
        if decode is None:
            pass
        elif batch == 1:  # as D_k q^T: products are faster with a left side that lies transposed
            rows = product(cast(decode, rows.dtype), rows.mT).mT
        else:
            rows = _by_head(rows, cast(decode, rows.dtype).mT)
        self.rows[0].score(rows, self._part(into, batch), scaling)

    def add_output(self, weight: Tensor, batch: int, out: Tensor) -> None:
        """Add ``(w v') D_v`` of the tokens held: of weights ``[Hkv * B, n, T]`` to ``out`` ``[Hkv * B, n, D]``."""
        decode, out = self.bases[1].decode, self._part(out, batch)
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
        decode = self.bases[side].decode
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

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


def _by_head(rows: Tensor, basis: Tensor) -> Tensor:
    """Each head's ``rows @ basis``: ``[h * B, n, a]`` and ``[h, a, b]`` to ``[h * B, n, b]``."""
    heads, inner, outer = basis.shape
    return product(rows.reshape(heads, rows.shape[0] // heads * rows.shape[1], inner), basis).view(
        *rows.shape[:2], outer
    )
