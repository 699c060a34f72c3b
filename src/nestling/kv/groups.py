"""Rank groups: the unit of storage of a nested cache. Some heads of one layer, their coordinates and exact tokens.

A group encodes and appends new tokens, and its view attends to what it holds at the time of a call.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = ("key", "value")
SMALL_PRODUCT = 2**16  # multiplications up to which a product is done without matmul on CPUs


class Buffer:
    """Rows of width w that grow in place: ``[B, heads, capacity, w]``, of which the first ``length`` are in use.

    Growing copies once per `CHUNK` tokens; appending writes in place. The tensor is compact in w: no slice of a wider
    tensor, which would keep the full width alive.
    """

    def __init__(self, width: int, chunk: int):
        self.width, self.chunk = width, chunk
        self.data: Tensor | None = None
        self.length = 0

    def append(self, rows: Tensor) -> None:
        end = self.length + rows.shape[-2]
        if self.data is None or end > self.data.shape[-2]:
            capacity = -(-end // self.chunk) * self.chunk
            grown = rows.new_empty(*rows.shape[:2], capacity, self.width)
            if self.length:
                grown[:, :, : self.length] = self.view()
            self.data = grown
        self.data[:, :, self.length : end] = rows
        self.length = end

    def view(self) -> Tensor:
        """The rows in use, ``[B, heads, length, w]``."""
        assert self.data is not None, "nothing was appended"
        return self.data[:, :, : self.length]

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by ``change(storage)``: batch selection, repetition, a move to another device."""
        if self.data is not None:
            self.data = change(self.data)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.untyped_storage().nbytes()


@dataclass(frozen=True)
class GroupView:
    """What one group holds at the time of a call, and how to read it. Shapes for h heads, r_k and r_v coordinates.

    ``keys`` ``[B, h, T, r_k]``, ``values`` ``[B, h, T, r_v]``: coordinates of all tokens but the exact ones.
    ``first`` and ``last``: exact (keys, values) ``[B, h, t, D]`` before and after them, or None.
    ``key_decode`` ``[h, r_k, D]``, ``value_decode`` ``[h, r_v, D]``; None where all D are kept as they are.
    ``key_bias``, ``value_bias`` ``[h, 1, D]``: the part of the mean that the dropped coordinates held, or None. That
    of keys only matters beside exact keys: among compressed ones it shifts all logits of a query alike.
    """

    heads: list[int]
    keys: Tensor
    values: Tensor
    first: tuple[Tensor, Tensor] | None
    last: tuple[Tensor, Tensor] | None
    key_decode: Tensor | None
    value_decode: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention in coordinates: ``[B, h, G * Tq, D]`` from the layer's packed queries ``[B, Hkv, G * Tq, D]``.

        Logits are ``(q D_k^T) k'^T`` and the output ``(softmax(...) v') D_v``: the history is never expanded.
        """
        work = _work_dtype(query.device, query.dtype)
        query = (query if len(self.heads) == query.shape[1] else query[:, self.heads]).to(work) * scaling
        coordinates = query if self.key_decode is None else _product(query, self.key_decode.to(work).mT)
        score = _product(coordinates, self.keys.to(work).mT)
        exact = [pair for pair in (self.first, self.last) if pair is not None]
        if not exact:
            weight = _softmax(score, mask)
            out = self._decode_values(_product(weight, self.values.to(work)))
            return out if self.value_bias is None else out + self.value_bias.to(work)
        keys, values = exact[0] if len(exact) == 1 else (torch.cat(sides, -2) for sides in zip(*exact, strict=True))
        if self.key_bias is not None:
            score = score + (query * self.key_bias.to(work)).sum(-1, keepdim=True)
        start = 0 if self.first is None else self.first[0].shape[-2]
        exact_score = _product(query, keys.to(work).mT)
        score = torch.cat((exact_score[..., :start], score, exact_score[..., start:]), -1)  # in the order of the mask
        before, weight, after = _softmax(score, mask).split(
            (start, self.keys.shape[-2], exact_score.shape[-1] - start), -1
        )
        out = self._decode_values(_product(weight, self.values.to(work)))
        if self.value_bias is not None:
            out = out + weight.sum(-1, keepdim=True) * self.value_bias.to(work)
        return out + _product(torch.cat((before, after), -1), values.to(work))

    def _decode_values(self, out: Tensor) -> Tensor:
        return out if self.value_decode is None else _product(out, self.value_decode.to(out.dtype))

    def expand(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Full-width keys and values ``[B, h, T, D]``, decoded: for many query tokens, one layer at a time."""
        work = _work_dtype(self.keys.device, dtype)
        keys, values = (
            (rows if decode is None else rows.to(work) @ decode.to(work) + (0 if bias is None else bias.to(work))).to(
                dtype
            )
            for rows, decode, bias in (
                (self.keys, self.key_decode, self.key_bias),
                (self.values, self.value_decode, self.value_bias),
            )
        )
        parts = [p for p in (self.first, (keys, values), self.last) if p is not None]
        if len(parts) == 1:
            return keys, values
        return torch.cat([p[0].to(dtype) for p in parts], -2), torch.cat([p[1].to(dtype) for p in parts], -2)


class RankGroup:
    """The KV heads of one layer that share a rank for keys and a rank for values."""

    def __init__(
        self, heads: list[int], bases: dict[str, Tensor], ranks: tuple[int, int], sinks: int, window: int, chunk: int
    ):
        """``bases``: of the layer, {key,value}_encode and _decode ``[Hkv, D, D]``, and {key,value}_mean ``[Hkv, D]``
        (optional): what the coordinates that are not stored are taken to be at.
        """
        self.heads, self.sinks, self.window = heads, sinks, window
        width = bases["key_encode"].shape[-1]
        self.encode = [_cut(bases[f"{side}_encode"], heads, rank, -1) for side, rank in zip(SIDES, ranks, strict=True)]
        self.decode = [_cut(bases[f"{side}_decode"], heads, rank, -2) for side, rank in zip(SIDES, ranks, strict=True)]
        pairs = zip(SIDES, self.encode, self.decode, strict=True)
        self.bias = [_rest(bases.get(f"{side}_mean"), heads, *pair) for side, *pair in pairs]
        if ranks == (width, width):
            self.sinks = self.window = 0  # everything is exact already
        self.rows = [Buffer(rank, chunk) for rank in ranks]
        self.first: tuple[Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
        """Store new keys and values of the layer, ``[B, Hkv, t, D]``, as far as they are of this group's heads."""
        states = [s if len(self.heads) == s.shape[1] else s[:, self.heads] for s in (keys, values)]
        kept = 0 if self.first is None else self.first[0].shape[-2]
        if kept < self.sinks:
            new = [s[:, :, : self.sinks - kept].to(dtype, copy=True) for s in states]  # a slice would keep them all
            self.first = _joined(self.first, new)
            states = [s[:, :, self.sinks - kept :] for s in states]
        if self.window:
            recent = _joined(self.last, states)
            cut = max(recent[0].shape[-2] - self.window, 0)
            states = [s[:, :, :cut] for s in recent]
            self.last = _pair(s[:, :, cut:].to(dtype, copy=True) for s in recent)
        if not states[0].shape[-2] and self.rows[0].data is not None:
            return
        for rows, encode, state in zip(self.rows, self.encode, states, strict=True):
            if encode is not None:
                work = _work_dtype(state.device, state.dtype)
                state = _product(state.to(work), encode.to(work))
            rows.append(state.to(dtype))

    def view(self) -> GroupView:
        keys, values = (rows.view() for rows in self.rows)
        return GroupView(self.heads, keys, values, self.first, self.last, *self.decode, *self.bias)

    def crop(self, remove: int) -> None:
        """Forget the last ``remove`` tokens: of the window first, then of the coordinates, then of the sinks."""
        if self.last is not None:
            cut = min(remove, self.last[0].shape[-2])
            self.last = _pair(s[:, :, : s.shape[-2] - cut].clone() for s in self.last)
            remove -= cut
        cut = min(remove, self.rows[0].length)
        for rows in self.rows:
            rows.length -= cut
        if self.first is not None and remove > cut:
            keep = self.first[0].shape[-2] - (remove - cut)
            self.first = _pair(s[:, :, :keep].clone() for s in self.first) if keep > 0 else None

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every stored tensor."""
        for rows in self.rows:
            rows.apply(change)
        self.first = self.first and _pair(map(change, self.first))
        self.last = self.last and _pair(map(change, self.last))

    def reset(self) -> None:
        for rows in self.rows:
            rows.data, rows.length = None, 0
        self.first = self.last = None

    @property
    def nbytes(self) -> int:
        exact = [*(self.first or ()), *(self.last or ())]
        return sum(r.nbytes for r in self.rows) + sum(t.untyped_storage().nbytes() for t in exact)


def _work_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products: CPUs are slow at 16 bits, up to 20 times, so at least fp32 there."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``. A small product on several CPU threads goes without matmul, which takes longer to wake them.

    With two threads and ``OMP_WAIT_POLICY=passive`` a batched matmul takes 0.1 ms or more; a decode step has hundreds.
    """
    small = left.numel() * right.shape[-1] <= SMALL_PRODUCT
    if small and left.device.type == "cpu" and torch.get_num_threads() > 1:
        return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)
    return left @ right


def _softmax(score: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights from scaled logits; ``mask`` as SDPA takes it."""
    if mask is not None:
        masked = torch.finfo(score.dtype).min
        score = score.masked_fill(~mask, masked) if mask.dtype == torch.bool else score + mask
    return score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(score.dtype)


def _cut(matrices: Tensor, heads: list[int], rank: int, dim: int) -> Tensor | None:
    """The first ``rank`` columns (dim -1) or rows (dim -2) of some heads' matrices; None at full width."""
    if rank == matrices.shape[-1]:
        return None
    return matrices.narrow(dim, 0, rank)[heads]  # indexing by a list copies, so the full width can be freed


def _rest(mean: Tensor | None, heads: list[int], encode: Tensor | None, decode: Tensor | None) -> Tensor | None:
    """The part of some heads' mean ``[Hkv, D]`` outside of the coordinates that are kept, ``[h, 1, D]``."""
    if mean is None or encode is None or decode is None:
        return None
    return mean[heads, None] - mean[heads, None] @ encode @ decode


def _pair(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    keys, values = tensors
    return keys, values


def _joined(held: tuple[Tensor, Tensor] | None, new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values, what is held in front of what is new, in the precision of what is new."""
    if held is None:
        return _pair(new)
    return _pair(torch.cat((h.to(n.dtype), n), -2) for h, n in zip(held, new, strict=True))
