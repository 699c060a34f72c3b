"""Moments: one streaming pass over text, and the bases that have a closed form in what it gathers.

Second moments per layer and KV head of post-RoPE keys, of the post-RoPE queries of the head's group, of values and of
head outputs; and the covariance of keys as attention sees them, within what one query attends to. With the means, at
which dropped coordinates are fixed. Constant memory, through a cache that transformers itself drives, so that any
served model calibrates.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nestling.basis import NestedBasis, balanced, pca
from nestling.errors import CalibrationError
from nestling.kv.cache.rule import SKIP
from nestling.kv.calibration.config import BASES
from nestling.kv.integration.attach import (
    PassThroughLayer,
    compressible_layers,
    each_output_projection,
    head_shape,
    input_device,
    logits_of_last,
    sdpa,
    served,
    stock_layers,
    text_config,
)
from nestling.options import choice

QUERY_STRIDE = 16  # one query in so many is read for the attended keys: their attention weights are explicit


@dataclass
class Moments:
    """Sums for one layer, fp64.

    Attributes:
        keys, queries, values, outputs: over tokens, and over the heads of the group, ``[Hkv, D, D]``.
        attended: over queries, the covariance of the keys under the query's attention weights, ``[Hkv, D, D]``.
        key_sum, value_sum, output_sum: over tokens, ``[Hkv, D]``.
        attended_sum: over queries, the mean key under the attention weights, ``[Hkv, D]``.
        mass: the attention mass behind ``attended``, ``[Hkv]``.
        tokens: how many tokens were added.
        group: query heads per KV head.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    outputs: Tensor
    attended: Tensor
    key_sum: Tensor
    value_sum: Tensor
    output_sum: Tensor
    attended_sum: Tensor
    mass: Tensor
    tokens: int = 0
    group: int = 1

    @classmethod
    def zeros(cls, kv_heads: int, width: int) -> "Moments":
        zeros = partial(torch.zeros, dtype=torch.float64)
        keys, queries, values, outputs, attended = (zeros(kv_heads, width, width) for _ in range(5))
        key_sum, value_sum, output_sum, attended_sum = (zeros(kv_heads, width) for _ in range(4))
        return cls(
            keys, queries, values, outputs, attended, key_sum, value_sum, output_sum, attended_sum, zeros(kv_heads)
        )

    def add(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, keep: Tensor) -> None:
        """Add query ``[B, Hq, T, D]``, key, value ``[B, Hkv, T, D]``, output ``[B, T, Hq, D]``, keep ``[B, T]``."""
        kv_heads = key.shape[1]
        if not keep.any():
            return
        self.tokens += int(keep.sum())
        self.group = query.shape[1] // kv_heads
        for total, mean, states in (
            (self.keys, self.key_sum, key.transpose(1, 2)),
            (self.queries, None, query.transpose(1, 2)),
            (self.values, self.value_sum, value.transpose(1, 2)),
            (self.outputs, self.output_sum, output),
        ):
            rows = _rows(states, keep, kv_heads)
            centre = rows.mean(1, keepdim=True)  # large means (key biases) would cost fp32 squares their digits
            squares = ((rows - centre).mT @ (rows - centre)).double().cpu()
            centre = centre.double().cpu()
            total += squares + rows.shape[1] * (centre.mT @ centre)
            if mean is not None:
                mean += rows.shape[1] * centre[:, 0]

    def add_attended(self, query: Tensor, key: Tensor, mask: Tensor | None, keep: Tensor, scaling: float) -> None:
        """Add what a sample of the queries attend to; shapes as in `add`, ``mask`` as SDPA takes it.

        A change of the keys by an error e_j moves the output of query i, to second order, by the variance of q_i e_j
        under its attention weights a_ij: keys that nobody reads do not matter, nor does what all keys of a query
        share. Weights on keys that are left out (sinks, padding) are dropped.
        """
        length, kv_heads = key.shape[2], key.shape[1]
        rows = torch.arange(length - 1, -1, -QUERY_STRIDE, device=key.device)
        if mask is None:
            mask = (torch.arange(length, device=key.device) <= rows[:, None])[None, None]
        else:
            mask = mask[:, :, rows]
        packed, key = query[:, :, rows].float().unflatten(1, (kv_heads, -1)).flatten(2, 3), key.float()
        logits = (packed * scaling @ key.mT).unflatten(2, (-1, len(rows)))
        weights = logits.masked_fill(~mask[:, :, None], torch.finfo(logits.dtype).min).softmax(-1)
        weights *= (keep[:, rows, None] & keep[:, None])[:, None, None]
        weights = weights.flatten(2, 3)
        by_key, by_query = weights.sum(2)[..., None], weights.sum(-1, keepdim=True)
        centre = key.mean(2, keepdim=True)  # a covariance does not see it, and fp32 squares keep their digits
        key = key - centre
        means = (weights @ key) / by_query.clamp_min(1e-12).sqrt()
        self.attended += ((by_key * key).mT @ key - means.mT @ means).sum(0).double().cpu()
        self.attended_sum += (by_key * (key + centre)).sum((0, 2)).double().cpu()
        self.mass += by_key.sum((0, 2, 3)).double().cpu()

    @property
    def key_covariance(self) -> Tensor:
        return _covariance(self.keys, self.key_sum, self.tokens)

    def means(self, basis: str) -> tuple[Tensor, Tensor]:
        """What dropped coordinates of keys and of values are taken to be at, ``[Hkv, D]`` each."""
        if basis == "pca":
            return self.key_sum / self.tokens, torch.zeros_like(self.value_sum)
        return self.attended_sum / self.mass.clamp_min(1e-12)[:, None], self.output_sum / (self.tokens * self.group)


def collect_moments(
    model, windows: Iterable[Tensor], *, skip: int = SKIP, padding: Iterable[Tensor] | None = None
) -> dict[int, Moments]:
    """One streaming pass: the `Moments` of every compressible layer, by layer index.

    Args:
        model: a causal LM.
        windows: batches of token ids ``[B, T]``.
        skip: leading positions of each row (after its padding) that are left out.
        padding: attention masks ``[B, T]`` (1 for tokens) in step with ``windows``, or None.

    Raises:
        CalibrationError: if no token is left, or a statistic is not finite (the layer is named).
        UnsupportedModelError: if the model's cache cannot be compressed.
    """
    config = text_config(model)
    _, kv_heads, width = head_shape(config)
    moments = {i: Moments.zeros(kv_heads, width) for i in compressible_layers(config)}
    masks = iter(padding) if padding is not None else None
    with served(model):
        device = input_device(model)
        for ids in windows:
            ids = ids.to(device)
            mask = torch.ones_like(ids) if masks is None else next(masks).to(ids.device)
            keep = (mask.cumsum(-1) > skip) & mask.bool()
            layers = stock_layers(config)
            for index, moment in moments.items():
                layers[index] = _MomentsLayer(moment, keep)
            extra = {} if masks is None else {"attention_mask": mask}
            logits_of_last(model, ids, Cache(layers=layers), **extra)
    for index, moment in moments.items():
        if not moment.tokens:
            raise CalibrationError(f"no token is left after the first {skip} positions and padding: use longer text")
        for name in ("keys", "queries", "values", "outputs", "attended"):
            if not torch.isfinite(getattr(moment, name)).all():
                raise CalibrationError(f"layer {index}: the {name} hold NaN or infinity; check weights and dtype")
    return moments


def make_bases(model, moments: dict[int, Moments], basis: str) -> dict[int, tuple[NestedBasis, NestedBasis]]:
    """The (key, value) bases ``[Hkv, D, D]`` of every layer.

    ``pca`` uses the covariance of keys and the second moment of values. arXiv 2410.14731 centres both; values do
    better uncentred where the first tokens, which are read much and hold little, are compressed too.

    ``balanced`` weighs key errors by the queries that will read them (arXiv 2512.05916), over the keys as attention
    weighs them, and value errors by the output projection: what is compressed there is the head output, since a linear
    map commutes with the attention average.
    """
    if choice("basis", basis, BASES) == "pca":
        return {i: (pca(m.key_covariance), pca(m.values / m.tokens)) for i, m in moments.items()}
    metrics = {i: _metric(weight, moments[i]) for i, weight in each_output_projection(model) if i in moments}
    if missing := sorted(set(moments) - set(metrics)):
        warnings.warn(
            f"the output projection of layers {', '.join(map(str, missing))} was not found: errors of all coordinates "
            "of a value count alike there, so that less can be saved at the same quality",
            stacklevel=2,
        )
    return {
        i: (
            balanced(m.attended / m.mass.clamp_min(1e-12)[:, None, None], m.queries / m.tokens),
            balanced(_covariance(m.outputs, m.output_sum, m.tokens * m.group), metrics.get(i, _unweighted(m))),
        )
        for i, m in moments.items()
    }


class _MomentsLayer(PassThroughLayer):
    def __init__(self, moments: Moments, keep: Tensor):
        super().__init__()
        self.moments, self.keep = moments, keep

    def update(self, key_states, value_states, *args, **kwargs):
        handle = _MomentsHandle(self.moments, self.keep, key_states, value_states)
        return handle, handle


@dataclass
class _MomentsHandle:
    moments: Moments
    keep: Tensor
    key: Tensor
    value: Tensor

    def attend(self, module, query, mask, **kwargs):
        output = sdpa(module, query, self.key, self.value, mask, **kwargs)
        keep = self.keep.to(query.device)
        self.moments.add(query, self.key, self.value, output, keep)
        self.moments.add_attended(query, self.key, mask, keep, kwargs["scaling"])
        return output


def _covariance(squares: Tensor, sums: Tensor, count: int) -> Tensor:
    """Covariance ``[Hkv, D, D]`` from sums of outer products and of vectors over ``count`` vectors."""
    mean = sums / count
    return squares / count - mean[:, :, None] * mean[:, None, :]


def _rows(states: Tensor, keep: Tensor, kv_heads: int) -> Tensor:
    """The kept rows of ``[B, T, H, D]`` by KV head, ``[Hkv, N * H / Hkv, D]`` fp32: a group's heads are pooled."""
    rows = states[keep].float()
    return rows.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _metric(weight: Tensor, moments: Moments) -> Tensor:
    """Sum over the group of W_O,h W_O,h^T ``[Hkv, D, D]``."""
    kv_heads, width, _ = moments.outputs.shape
    blocks = weight.double().unflatten(1, (kv_heads, -1, width))
    return torch.einsum("ohgd,ohge->hde", blocks, blocks)


def _unweighted(moments: Moments) -> Tensor:
    kv_heads, width, _ = moments.outputs.shape
    return torch.eye(width, dtype=torch.float64).expand(kv_heads, width, width)
