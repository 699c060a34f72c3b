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
from nestling.kv.products import product, product_into, product_onto, softmax, work_dtype

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
    shape, dtype, batch = query.shape, work_dtype(query.device, query.dtype), query.shape[1]
    query = query.to(dtype).reshape(shape[0] * batch, -1, shape[-1])
    coded = groups[0].length
    parts = [(g, slice(g.start * batch, g.stop * batch)) for g in groups] if coded else []
    key_bias, value_bias = (_for_batch(bias, batch, dtype) if coded else None for bias in biases)
    states = [side.flatten(0, 1).to(dtype) for side in exact.view()] if exact is not None and exact.length else []

    scores = []
    if parts:
        scores.append(query.new_empty(*query.shape[:2], coded))
    for group, part in parts:
        coordinates = _change_basis(query[part], group.decode[0])
        product_into(scores[0][part], coordinates, group.rows[0].flat().to(dtype), alpha=scaling)
    if states and key_bias is not None:  # all logits of a query may be shifted alike: these are the few
        shift = product(query, key_bias.mT)
        scores.append(product_onto(shift, query, states[0].mT, beta=-scaling, alpha=scaling))
    elif states:
        scores.append(product(query, states[0].mT).mul_(scaling))
    score = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    if mask is not None:
        _hide(score.view(*shape[:4], -1), mask if exact is None else _in_order_of_scores(mask, exact.first, coded))

    weight = softmax(score)
    beside = weight[..., coded:]
    if value_bias is None:
        out = product(beside, states[1]) if states else torch.zeros_like(query)
    elif states:  # the bias is for the weight of all compressed tokens, known from that of the few others
        out = product_onto(value_bias, beside, states[1])
        product_into(out, beside.sum(-1, keepdim=True), value_bias, beta=1, alpha=-1)
    else:
        out = value_bias + torch.zeros_like(query)
    for group, part in parts:
        coordinates = product(weight[part, :, :coded], group.rows[1].flat().to(dtype).mT)
        out[part] += _change_basis(coordinates, group.decode[1])
    return out.view(shape)


def _change_basis(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Each head's ``rows @ basis``: ``[h * B, n, a]`` and ``[h, a, b]`` to ``[h * B, n, b]``; None is no change."""
    if basis is None:
        return rows
    if len(rows) == len(basis):
        return product(rows, basis.to(rows.dtype))
    return product(rows.reshape(len(basis), -1, rows.shape[-1]), basis.to(rows.dtype)).view(*rows.shape[:2], -1)


def _for_batch(bias: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """``[Hkv, 1, D]`` to ``[Hkv * B, 1, D]``."""
    if bias is None or batch == 1:
        return None if bias is None else bias.to(dtype)
    return bias.to(dtype).repeat_interleave(batch, 0)


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
