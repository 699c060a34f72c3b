"""Rank groups: the unit of storage of a nested cache. Some heads of one layer and their coordinates.

A group encodes and appends the tokens that are given to it, and reads what it holds. Storage has the heads first, so
that in tensors of a whole layer a group is a slice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.kv.products import cast, product, product_into, work_dtype

SIDES = ("key", "value")


class Buffer:
    """Coordinates of tokens that grow in place: ``[h, B, w, capacity]``, of which the first ``length`` are in use.

    Growing copies once per chunk; appending writes in place. A coordinate of all tokens is a row: for the few queries
    of a decode step, products with such storage read up to twice as many bytes per second. The tensor is compact in w:
    no slice of a wider tensor, which would keep the full width alive.

    ``by_token=True`` stores ``[h, B, capacity, w]`` instead, which is what SDPA reads.
    """

    def __init__(self, chunk: int, by_token: bool = False):
        self.chunk, self.dim = chunk, 2 if by_token else 3
        self.data: Tensor | None = None
        self._flat: Tensor | None = None  # the same memory
        self.length = 0

    def append(self, new: Tensor, dtype: torch.dtype) -> None:
        """Add t tokens, ``[h, B, w, t]`` or, by token, ``[h, B, t, w]``."""
        count = new.shape[self.dim]
        end = self.length + count
        if self.data is None or end > self.data.shape[self.dim]:
            shape = list(new.shape)
            shape[self.dim] = -(-end // self.chunk) * self.chunk
            grown = new.new_empty(shape, dtype=dtype)
            if self.length:
                grown.narrow(self.dim, 0, self.length).copy_(self.view())
            self._store(grown)
        assert self.data is not None
        self.data.narrow(self.dim, self.length, count).copy_(new)
        self.length = end

    def view(self) -> Tensor:
        """The tokens in use, ``[h, B, w, length]`` or, by token, ``[h, B, length, w]``."""
        assert self.data is not None, "nothing was appended"
        return self.data.narrow(self.dim, 0, self.length)

    def flat(self) -> Tensor:
        """The tokens in use as products take them, ``[h * B, w, length]`` or, by token, ``[h * B, length, w]``."""
        assert self._flat is not None, "nothing was appended"
        return self._flat.narrow(self.dim - 1, 0, self.length)

    def _store(self, data: Tensor) -> None:
        self.data, self._flat = data, data.flatten(0, 1)

    def select(self, places: Tensor) -> None:
        """Keep the tokens at ``places`` ``[h, B, k]`` alone, in storage that fits them."""
        view, dtype = self.view(), self.view().dtype
        index = places.unsqueeze(5 - self.dim)
        index = index.expand(*[view.shape[d] if d == 5 - self.dim else index.shape[d] for d in range(4)])
        kept = view.gather(self.dim, index)
        self.reset()
        self.append(kept, dtype)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by ``change(storage)``: batch selection (dimension 1), repetition, another device."""
        if self.data is not None:
            self._store(change(self.data).contiguous())

    def reset(self) -> None:
        self.data, self._flat, self.length = None, None, 0

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.untyped_storage().nbytes()


class RankGroup:
    """The KV heads of one layer that share a rank for keys and a rank for values.

    ``heads`` in the model's order; in tensors of the layer they are at ``start`` and the following places.
    ``encode``, transposed, and ``decode``: ``[h, r, D]`` of keys and of values. None at full width, where keys or
    values are kept as they are.
    """

    def __init__(
        self,
        heads: list[int],
        start: int,
        bases: dict[str, Tensor],
        ranks: tuple[int, int],
        chunk: int,
        by_token: bool = False,
    ):
        """``bases``: of the layer, {key,value}_encode and _decode ``[Hkv, D, D]``."""
        self.heads, self.start, self.stop = heads, start, start + len(heads)
        encode = [_cut(bases[f"{side}_encode"].mT, heads, rank) for side, rank in zip(SIDES, ranks, strict=True)]
        decode = [_cut(bases[f"{side}_decode"], heads, rank) for side, rank in zip(SIDES, ranks, strict=True)]
        self.device = bases["key_encode"].device
        self.encode, self.decode = encode, decode
        self.rows = [Buffer(chunk, by_token) for _ in ranks]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.rows[0].length

    def append(self, states: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Store keys and values of the layer ``[Hkv, B, t, D]``, as far as they are of this group's heads."""
        for rows, encode, state in zip(self.rows, self.encode, states, strict=True):
            state = state[self.start : self.stop]
            if encode is not None:
                heads, batch, count, width = state.shape
                work = work_dtype(state.device, state.dtype)
                columns = state.to(work).reshape(heads, batch * count, width).mT
                coordinates = product(encode.to(work), columns)
                rows.append(coordinates.view(heads, -1, batch, count).transpose(1, 2), dtype)
            else:
                rows.append(state if rows.dim == 2 else state.mT, dtype)

    def score(self, query: Tensor, batch: int, scaling: float, into: Tensor) -> None:
        """Logits of the tokens held, ``(q D_k^T) k'^T``: of ``query`` ``[Hkv * B, n, D]`` into ``[Hkv * B, n, T]``."""
        rows, keys, decode = self._part(query, batch), self.rows[0].flat(), self.decode[0]
        if decode is None:
            pass
        elif batch == 1:  # as D_k q^T: products are faster with a left side that lies transposed
            rows = product(cast(decode, rows.dtype), rows.mT).mT
        else:
            rows = _by_head(rows, cast(decode, rows.dtype).mT)
        product_into(self._part(into, batch), rows, cast(keys, rows.dtype), alpha=scaling)

    def add_output(self, weight: Tensor, batch: int, out: Tensor) -> None:
        """Add ``(w v') D_v`` of the tokens held: of weights ``[Hkv * B, n, T]`` to ``out`` ``[Hkv * B, n, D]``."""
        values, decode, out = cast(self.rows[1].flat(), weight.dtype), self.decode[1], self._part(out, batch)
        rows = product(self._part(weight, batch), values.mT)
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
        rows, decode = self.rows[side].view().mT, self.decode[side]
        if decode is None:
            return rows.to(dtype)
        work = work_dtype(rows.device, dtype)
        states = rows.to(work) @ decode[:, None].to(work)
        return (states if bias is None else states + bias[self.start : self.stop, None].to(work)).to(dtype)

    def select(self, places: Tensor) -> None:
        """Keep the tokens at ``places`` ``[Hkv, B, k]`` of the layer alone."""
        for rows in self.rows:
            rows.select(places[self.start : self.stop])

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens held."""
        for rows in self.rows:
            rows.length -= remove

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


def shared_biases(groups: list[RankGroup], bases: dict[str, Tensor]) -> list[Tensor | None]:
    """Of keys and of values, the part of the mean that no group keeps: ``[Hkv, 1, D]`` in the order of the groups.

    It is zero for heads at full width, and None if it is for all of them. ``bases`` may hold {key,value}_mean
    ``[Hkv, D]``: what the coordinates that are not stored are taken to be at.
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
    return product(rows.reshape(basis.shape[0], -1, rows.shape[-1]), basis).view(*rows.shape[:2], -1)


def _rest(mean: Tensor, group: RankGroup, side: int) -> Tensor:
    """What coordinates that a group does not store hold of means ``[h, 1, D]``."""
    encode, decode = group.encode[side], group.decode[side]
    if encode is None or decode is None:
        return torch.zeros_like(mean)
    return mean - mean @ encode.mT @ decode


def _cut(matrices: Tensor, heads: list[int], rank: int) -> Tensor | None:
    """The first ``rank`` rows of some heads' matrices; None at full width."""
    if rank == matrices.shape[-1]:
        return None
    return matrices[heads, :rank].contiguous()  # indexing by a list copies, so the full width can be freed
