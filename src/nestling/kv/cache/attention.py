"""Attention over rank groups and exact tokens: in coordinates for few queries, at full width for many.

Both read one layer whose heads are in the order of its groups, so that the heads of a group are a slice. All heads of
the layer share one softmax and one product with the exact tokens; left for each group are the four products of
`RankGroup.score` and `RankGroup.add_output`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.kv.cache.drift import add_by_span, span_count, span_of
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.groups import RankGroup
from nestling.kv.cache.matmul import cast, product, product_onto, softmax, work_dtype

Biases = Sequence[Tensor | None]


def attend(
    query: Tensor,
    groups: Sequence[RankGroup],
    exact: Sequence[Tensor] | None,
    biases: Biases,
    drift: Tensor | None,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention in coordinates: ``[Hkv, B, G, Tq, D]`` from queries of that shape, G heads to a KV head.

    Args:
        groups: coordinates of compressed tokens, T_c of them.
        exact: keys and values of exact tokens, ``[Hkv * B, T_e, D]``, if there are any.
        biases: of keys and of values, ``[Hkv, 1, D]``: the part of the mean in coordinates that are not stored.
        drift: what is added to that of keys in each span of compressed tokens, ``[Hkv, spans, D]``, if anything is.
        mask: ``[B, 1, 1 or Tq, T_c + T_e]``, as SDPA takes it: compressed tokens first.

    Returns:
        The output, and the attention weights ``[Hkv, B, G * Tq, T_c + T_e]``.
    """
    shape, batch = query.shape, query.shape[1]
    dtype = work_dtype(query.device, query.dtype)
    query = cast(query, dtype).reshape(shape[0] * batch, -1, shape[-1])
    coded = groups[0].length
    key_bias, value_bias = (_for_batch(bias, batch, dtype) if coded else None for bias in biases)
    if not coded:
        groups = ()
    keys, values = (cast(side, dtype) for side in exact) if exact is not None and exact[0].shape[1] else (None, None)

    scores = [query.new_empty(*query.shape[:2], coded)] if coded else []
    for group in groups:
        group.score(query, batch, scaling, into=scores[0])
    if drift is not None and coded:
        spans = _for_batch(drift[:, : span_count(coded, drift.shape[1])], batch, dtype)
        add_by_span(scores[0], product(query, spans.mT).mul_(scaling))
    if keys is not None:
        scores.append(_exact_scores(query, keys, key_bias, scaling))
    score = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    if mask is not None:
        _hide(score.view(*shape[:4], -1), mask)

    weight = softmax(score)
    out = _exact_output(query, weight.narrow(2, coded, weight.shape[2] - coded), values, value_bias)
    for group in groups:
        group.add_output(weight.narrow(2, 0, coded), batch, out)
    return out.view(shape), weight.view(shape[0], batch, -1, weight.shape[2])


def _exact_scores(query: Tensor, keys: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Logits of exact tokens, less what the bias would add to those of compressed ones.

    The softmax does not see a shift of all logits of a query, and these are the few.
    """
    if bias is None:
        return product(query, keys.mT).mul_(scaling)
    return product_onto(product(query, bias.mT), query, keys.mT, beta=-scaling, alpha=scaling)


def _exact_output(query: Tensor, weight: Tensor, values: Tensor | None, bias: Tensor | None) -> Tensor:
    """What exact tokens and the bias of the compressed ones add to the output, ``[Hkv * B, n, D]``.

    All weights of a query add up to one: the bias is added once, and exact values are taken relative to it.
    """
    if values is None:
        return torch.zeros_like(query) if bias is None else torch.zeros_like(query) + bias
    if bias is None:
        return product(weight, values)
    return product_onto(bias, weight, values - bias)


def _for_batch(bias: Tensor | None, batch: int, dtype: torch.dtype) -> Any:
    """``[Hkv, n, D]`` to ``[Hkv * B, n, D]``."""
    if bias is None or batch == 1:
        return None if bias is None else cast(bias, dtype)
    return cast(bias, dtype).repeat_interleave(batch, 0)


def compressed_first(columns: Tensor, sinks: int, coded: int) -> Tensor:
    """The last axis, from the order of the text to that of `attend`: compressed tokens before sinks."""
    if not sinks or not coded:
        return columns
    return torch.cat((columns[..., sinks : sinks + coded], columns[..., :sinks], columns[..., sinks + coded :]), -1)


def _hide(score: Tensor, mask: Tensor) -> None:
    """Apply a mask ``[B, 1, Tq, T]`` to logits ``[Hkv, B, G, Tq, T]`` in place."""
    if mask.dtype == torch.bool:
        score.masked_fill_(~mask, torch.finfo(score.dtype).min)
    else:
        score.add_(mask)


def expand(
    groups: Sequence[RankGroup], exact: ExactStore | None, biases: Biases, drift: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Full-width keys and values ``[Hkv, B, T, D]`` in the order of the text, decoded: one layer at a time."""
    decoded = decode(groups, biases, drift, dtype)
    if exact is None or not exact.length:
        return decoded
    states, sinks = [side.to(dtype) for side in exact.view()], exact.first
    if not exact.left:
        return states
    return [torch.cat((e[:, :, :sinks], c, e[:, :, sinks:]), 2) for e, c in zip(states, decoded, strict=True)]


def decode(groups: Sequence[RankGroup], biases: Biases, drift: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Full-width keys and values ``[Hkv, B, T, D]`` of the compressed tokens; of none, no tensors."""
    if not (coded := groups[0].length):
        return []
    if drift is not None:
        spans = span_of(torch.arange(coded, device=drift.device), drift.shape[1])
        assert biases[0] is not None, "what is not stored has a mean"
        biases = (biases[0] + drift.float().index_select(1, spans), biases[1])
    return [torch.cat([group.expand(side, biases[side], dtype) for group in groups]) for side in (0, 1)]
