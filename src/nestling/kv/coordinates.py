"""Attention over rank groups and exact tokens: in coordinates for few queries, at full width for many.

Both read one layer whose heads are in the order of its groups, so that the heads of a group are a slice. In
coordinates, the logits of compressed tokens are ``(q D_k^T) k'^T`` and their part of the output is
``(softmax(...) v') D_v``: the history is never expanded. All heads of the layer share one softmax and one product with
the exact tokens; left for each group are its four products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.kv.exact import ExactStore
from nestling.kv.groups import RankGroup
from nestling.kv.products import product, product_into, softmax, work_dtype

ALIGNED = 16  # logits have a multiple of it in columns: products that write rows at odd strides take longer
Biases = Sequence[Tensor | None]


def attend(
    query: Tensor,
    groups: Sequence[RankGroup],
    exact: ExactStore | None,
    biases: Biases,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention in coordinates: ``[Hkv, B, G, Tq, D]`` from queries of that shape, G heads to a KV head.

    Args:
        groups, exact: what the layer holds: coordinates of all tokens but the exact ones.
        biases: of keys and of values, ``[Hkv, 1, D]``: the part of the mean in coordinates that are not stored.
        mask: ``[B, 1, 1 or Tq, T]``, as SDPA takes it.
    """
    shape, dtype = query.shape, work_dtype(query.device, query.dtype)
    query = query.to(dtype).reshape(shape[0] * shape[1], -1, shape[-1])
    coded, held = groups[0].length, 0 if exact is None else exact.length
    total, batch = coded + held, shape[1]
    states = [side.flatten(0, 1).to(dtype) for side in exact.view()] if exact is not None else []

    # columns: compressed tokens, exact tokens, nothing
    score = query.new_empty(*query.shape[:2], -(-total // ALIGNED) * ALIGNED)
    score[..., total:].fill_(-torch.inf)
    for group in groups if coded else ():
        part = slice(group.start * batch, group.stop * batch)
        coordinates = query[part] if group.decode[0] is None else _by_basis(query[part], group.decode[0])
        stored = group.rows[0].view().flatten(0, 1).to(dtype)
        product_into(score[part, :, :coded], coordinates, stored, scale=scaling)
    if held:
        beside = score[..., coded:total]
        product_into(beside, query, states[0].mT, scale=scaling)
        if coded and biases[0] is not None:  # all logits of a query may be shifted alike: these are the few
            beside.sub_(_by_basis(query, biases[0].mT), alpha=scaling)
    if mask is not None:
        sinks = 0 if exact is None else exact.first
        _hide(score.view(*shape[:4], -1)[..., :total], _in_order_of_scores(mask, sinks, coded))
    weight = softmax(score)

    beside = weight[..., coded:total]
    out = product(beside, states[1]) if held else torch.zeros_like(query)
    if coded and biases[1] is not None:  # for the weight of all compressed tokens, from that of the few others
        out = out + _by_basis(1 - beside.sum(-1, keepdim=True), biases[1])
    for group in groups if coded else ():
        part = slice(group.start * batch, group.stop * batch)
        coordinates = product(weight[part, :, :coded], group.rows[1].view().flatten(0, 1).to(dtype).mT)
        if group.decode[1] is None:
            out[part] += coordinates
        else:
            heads = len(group.heads)
            decode = group.decode[1].to(dtype)
            product_into(
                out[part].view(heads, -1, shape[-1]), coordinates.view(heads, -1, decode.shape[1]), decode, add=True
            )
    return out.view(shape)


def _by_basis(rows: Tensor, basis: Tensor) -> Tensor:
    """Each head's ``rows @ basis``: ``[h * B, n, a]`` and ``[h, a, b]`` to ``[h * B, n, b]``."""
    heads, _, width = basis.shape
    return product(rows.view(heads, -1, rows.shape[-1]), basis.to(rows.dtype)).view(*rows.shape[:2], width)


def _in_order_of_scores(mask: Tensor, sinks: int, coded: int) -> Tensor:
    """The columns of a mask, from the order of the text to that of the logits: compressed tokens before sinks."""
    if not sinks or not coded:
        return mask
    return torch.cat((mask[..., sinks : sinks + coded], mask[..., :sinks], mask[..., sinks + coded :]), -1)


def _hide(score: Tensor, mask: Tensor) -> None:
    """Apply a mask ``[B, 1, Tq, T]`` to logits ``[Hkv, B, G, Tq, T]`` in place."""
    if mask.dtype == torch.bool:
        score.masked_fill_(~mask, torch.finfo(score.dtype).min)
    else:
        score.add_(mask)


def expand(groups: Sequence[RankGroup], exact: ExactStore | None, biases: Biases, dtype: torch.dtype) -> list[Tensor]:
    """Full-width keys and values ``[Hkv, B, T, D]`` in the order of the text, decoded: one layer at a time."""
    found = []
    for side in (0, 1):
        parts = []
        if groups[0].length:
            parts = [torch.cat([_decoded(group, side, biases[side], dtype) for group in groups])]
        if exact is not None:
            states, sinks = exact.view()[side].to(dtype), exact.first
            parts = [states[:, :, :sinks], *parts, states[:, :, sinks:]]
        found.append(torch.cat(parts, 2))
    return found


def _decoded(group: RankGroup, side: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys (side 0) or values (side 1) of a group's compressed tokens, ``[h, B, T, D]``."""
    rows, decode = group.rows[side].view().mT, group.decode[side]
    if decode is None:
        return rows.to(dtype)
    work = work_dtype(rows.device, dtype)
    decode = decode.to(work)
    states = rows.to(work) @ (decode.mT if side == 0 else decode)[:, None]
    return (states if bias is None else states + bias[group.start : group.stop, None].to(work)).to(dtype)
