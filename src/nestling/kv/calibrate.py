"""Calibration: statistics of keys, queries, values and head outputs, and the bases and energies made from them.

Two passes over text, both through a cache that transformers itself drives, so that any served model calibrates:

1. moments: second moments per layer and KV head of post-RoPE keys, of the
   post-RoPE queries of the head's group, of values and of head outputs; and the covariance of keys as attention sees
   them, within what one query attends to. With the means, at which dropped coordinates are fixed. Constant memory.
2. sensitivity: the Fisher information of a mask on each coordinate. With labels y drawn from the model,
   ``F_i = E[(d log p(y) / d m_i)^2]`` and dropping coordinate i costs about ``F_i / 2`` nats of KL to the full model.
   Divided by the tokens of a window it is a KL per token, one unit for all layers, keys and values.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nestling.basis import NestedBasis, balanced, pca
from nestling.kv import attention
from nestling.kv.adapter import SIDES, KVAdapter
from nestling.progress import progress_bar
from nestling.tokens import token_windows

QUERY_STRIDE = 16  # one query in so many is read for the attended keys: their attention weights are explicit
SKIP = 4  # positions left out of all statistics: attention sinks have outlier keys, and caches keep them exact


class CalibrationError(ValueError):
    """Statistics that no basis can be made from; the message names the layer."""


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
    config = attention.text_config(model)
    _, kv_heads, width = attention.head_shape(config)
    moments = {i: Moments.zeros(kv_heads, width) for i in attention.compressible_layers(config)}
    masks = iter(padding) if padding is not None else None
    with _served(model):
        for ids in windows:
            ids = ids.to(model.device)
            mask = torch.ones_like(ids) if masks is None else next(masks).to(ids.device)
            keep = (mask.cumsum(-1) > skip) & mask.bool()
            layers = attention.stock_layers(config)
            for index, moment in moments.items():
                layers[index] = _MomentsLayer(moment, keep)
            extra = {} if masks is None else {"attention_mask": mask}
            attention.logits_of_last(model, ids, past_key_values=Cache(layers=layers), **extra)
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
    if basis not in ("pca", "balanced"):
        raise ValueError(f"basis must be 'pca' or 'balanced', got {basis!r}")
    if basis == "pca":
        return {i: (pca(m.key_covariance), pca(m.values / m.tokens)) for i, m in moments.items()}
    projections = attention.output_projections(model)
    return {
        i: (
            balanced(m.attended / m.mass.clamp_min(1e-12)[:, None, None], m.queries / m.tokens),
            balanced(_covariance(m.outputs, m.output_sum, m.tokens * m.group), _metric(projections.get(i), m)),
        )
        for i, m in moments.items()
    }


def sensitivity(
    model,
    bases: dict[int, tuple[NestedBasis, NestedBasis]],
    means: dict[int, tuple[Tensor, Tensor]],
    windows: Iterable[Tensor],
    *,
    skip: int = SKIP,
    seed: int = 0,
) -> dict[int, tuple[Tensor, Tensor]]:
    """The KL per token expected from fixing each coordinate of keys and of values at its mean, ``[Hkv, D]``, by layer.

    Half the Fisher information of a mask on the coordinate, over the tokens of a row, with labels sampled from the
    model. Cross terms between coordinates are left out. One forward and one backward pass without weight gradients.

    Args:
        windows: batches of token ids ``[B, T]``; every row is one sample of the gradient.
    """
    config = attention.text_config(model)
    total = {i: [torch.zeros_like(b.energy) for b in pair] for i, pair in bases.items()}
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = 0
    with _served(model), torch.enable_grad():
        for ids in windows:
            ids = ids.to(model.device)
            layers = attention.stock_layers(config)
            taps = {index: _TapLayer() for index in bases}
            for index, tap in taps.items():
                layers[index] = tap
            logits = model(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True).logits
            log_p = logits.float().log_softmax(-1)
            with torch.no_grad():
                labels = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(*ids.shape, 1)
            leaves = [leaf for tap in taps.values() for leaf in tap.leaves]
            gradients = iter(torch.autograd.grad(log_p.gather(-1, labels).sum(), leaves))
            tokens += ids.numel()
            for index, tap in taps.items():
                for side, basis in enumerate(bases[index]):
                    states, gradient = (t[:, :, skip:].double().cpu() for t in (tap.states[side], next(gradients)))
                    deviation = (states - means[index][side][:, None]) @ basis.encode
                    effect = (deviation * (gradient @ basis.decode.mT)).sum(2)
                    total[index][side] += effect.square().sum(0) / 2
    if not tokens:
        raise CalibrationError("no windows were given to measure the sensitivity")
    return {i: (pair[0] / tokens, pair[1] / tokens) for i, pair in total.items()}


def fit(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    basis: str = "balanced",
    *,
    tokens: int = 65536,
    length: int = 1024,
    batch_tokens: int = 4096,
    sensitivity_windows: int = 48,
    sensitivity_length: int = 128,
    skip: int = SKIP,
    seed: int = 0,
    progress: bool = True,
) -> KVAdapter:
    """Calibrate nested bases for a model's KV cache. No training: two passes over text.

    Args:
        model: a causal LM of transformers; switched to nestling's attention, weights untouched.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``. Text like that of the later use, as long as can be had.
        basis: ``"balanced"`` (query-aware keys, values weighed by the output projection) or ``"pca"`` (the paper's).
        tokens: tokens for the moments; all of the text is used if it is shorter.
        length: tokens per window. Post-RoPE statistics depend on the positions that were seen.
        batch_tokens: tokens per forward pass.
        sensitivity_windows, sensitivity_length: number and length of the windows on which energies are measured.
        skip: leading positions of each window that are left out.
        seed: for the labels that the model draws.
        progress: show a progress bar with an estimate of the time left.

    Returns:
        A `KVAdapter` that serves every budget.

    Raises:
        TextTooShortError: if there is not one window of text.
        CalibrationError: if a statistic is not finite (the layer is named).
        UnsupportedModelError: if the model's cache cannot be compressed; the message says why.
    """
    config = attention.text_config(model)
    attention.compressible_layers(config)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    windows = torch.stack(list(token_windows(tokenizer, texts, length, limit=max(1, tokens // length))))
    short = _short(windows, sensitivity_windows, sensitivity_length)
    batches, short_batches = windows.split(max(1, batch_tokens // length)), short.split(_batch(model, short))
    with progress_bar(progress) as bar:
        moments = collect_moments(model, bar.track(batches, description="moments"), skip=skip)
        bases = make_bases(model, moments, basis)
        means = {i: m.means(basis) for i, m in moments.items()}
        energy = sensitivity(
            model, bases, means, bar.track(short_batches, description="sensitivity"), skip=skip, seed=seed
        )
    if basis == "balanced":
        bases, energy = order_by_energy(bases, energy)
    info = {
        "basis": basis,
        "base_model": Path(config.name_or_path).name if config.name_or_path else None,
        "tokens": len(windows) * length,
        "length": length,
        "skip": skip,
        "condition": max(float(b.condition.max()) for pair in bases.values() for b in pair),
    }
    return KVAdapter.from_bases(config, bases, means, energy, info)


def measured_energy(
    model, adapter: KVAdapter, windows: Tensor, *, count: int = 48, length: int = 128, seed: int = 0, progress=True
) -> dict[str, Tensor]:
    """The energies of an adapter whose bases have changed, fp32 ``[L, Hkv, D]`` by side; see `sensitivity`.

    Args:
        windows: token ids ``[n, T]``; the first ``count`` pieces of ``length`` tokens are read.
    """
    pieces = _short(windows, count, length)
    bases: dict[int, tuple[NestedBasis, NestedBasis]] = {}
    means: dict[int, tuple[Tensor, Tensor]] = {}
    for row, layer in enumerate(adapter.fingerprint["layers"]):
        pairs = [(adapter.encode[s][row].double(), adapter.decode[s][row].double()) for s in SIDES]
        bases[layer] = tuple(
            NestedBasis(e, d, torch.zeros_like(e[..., 0]), torch.ones_like(e[..., 0, 0])) for e, d in pairs
        )
        means[layer] = tuple(adapter.mean[s][row].double() for s in SIDES)
    with progress_bar(progress) as bar:
        batches = bar.track(pieces.split(_batch(model, pieces)), description="energies")
        energy = sensitivity(model, bases, means, batches, seed=seed)
    return {side: torch.stack([energy[i][s] for i in energy]).float() for s, side in enumerate(SIDES)}


def _basis(encode: Tensor, decode: Tensor) -> NestedBasis:
    """A basis whose energies and condition are not known, as ones."""
    return NestedBasis(encode, decode, torch.ones_like(encode[..., 0]), torch.ones_like(encode[..., 0, 0]))


def _short(windows: Tensor, count: int, length: int) -> Tensor:
    """The first ``count`` pieces of ``length`` tokens of windows ``[n, T]``."""
    length = min(length, windows.shape[1])
    return windows.flatten()[: windows.numel() // length * length].view(-1, length)[:count]


def _batch(model, pieces: Tensor) -> int:
    """Pieces at a time: logits of the whole vocabulary are kept with their gradient, so few for large vocabularies."""
    return max(1, min(8, 2**26 // (attention.text_config(model).vocab_size * pieces.shape[1])))


def order_by_energy(bases: dict, energy: dict) -> tuple[dict, dict]:
    """Sort the coordinates of every head by measured energy, largest first, in place of the closed form's order.

    The closed forms order by the error of logits and of the output, the energies by what it does to the predictions.
    """
    orders = {i: [e.argsort(-1, descending=True) for e in pair] for i, pair in energy.items()}
    sorted_bases = {i: tuple(b.permuted(o) for b, o in zip(bases[i], orders[i], strict=True)) for i in bases}
    sorted_energy = {i: tuple(e.gather(-1, o) for e, o in zip(energy[i], orders[i], strict=True)) for i in energy}
    return sorted_bases, sorted_energy


class _MomentsLayer(attention.PassThroughLayer):
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
        output = attention.sdpa(module, query, self.key, self.value, mask, **kwargs)
        self.moments.add(query, self.key, self.value, output, self.keep)
        self.moments.add_attended(query, self.key, mask, self.keep, kwargs["scaling"])
        return output


class _TapLayer(attention.PassThroughLayer):
    """Adds zero leaves to keys and values, to read the gradient of the loss by each of them."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.states = (key_states.detach(), value_states.detach())
        self.leaves = [torch.zeros_like(s).requires_grad_() for s in self.states]
        return key_states + self.leaves[0], value_states + self.leaves[1]


class _served:
    """Within it the model is in eval mode and attends through the seam; its mode is restored afterwards."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        attention.attach(self.model)
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *exc):
        self.model.train(self.training)


def _covariance(squares: Tensor, sums: Tensor, count: int) -> Tensor:
    """Covariance ``[Hkv, D, D]`` from sums of outer products and of vectors over ``count`` vectors."""
    mean = sums / count
    return squares / count - mean[:, :, None] * mean[:, None, :]


def _rows(states: Tensor, keep: Tensor, kv_heads: int) -> Tensor:
    """The kept rows of ``[B, T, H, D]`` by KV head, ``[Hkv, N * H / Hkv, D]`` fp32: a group's heads are pooled."""
    rows = states[keep].float()
    return rows.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _metric(weight: Tensor | None, moments: Moments) -> Tensor:
    """Sum over the group of W_O,h W_O,h^T ``[Hkv, D, D]``; the identity where the projection was not found."""
    kv_heads, width, _ = moments.outputs.shape
    if weight is None:
        return torch.eye(width, dtype=torch.float64).expand(kv_heads, width, width)
    blocks = weight.double().cpu().unflatten(1, (kv_heads, -1, width))
    return torch.einsum("ohgd,ohge->hde", blocks, blocks)
