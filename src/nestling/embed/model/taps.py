"""Every depth of an encoder from one forward: the vector of each k-layer model, taken where that model would end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nestling.embed.model.parts import Encoder
from nestling.errors import LadderError


def taps(
    model: nn.Module,
    features: Mapping[str, Any],
    layers: Iterable[int],
    projections: Mapping[int, nn.Module] | None = None,
) -> dict[int, Tensor]:
    """The pooled vector at each depth, equal to what the model of the first k layers computes.

    On backbones that normalise before each layer (ModernBERT, Qwen3, Gemma 3, EuroBERT, T5) the final norm is applied
    at every depth, as the k-layer model does; the states between their layers are no embeddings. Pooling is the
    model's own, with what is trained behind it (Dense), but without a last Normalize: coordinates are dropped first.

    One forward through ``model`` as it is wrapped, so that DistributedDataParallel sees it. Layers above the deepest
    one asked for are not run, and states of layers that are not asked for are not kept. Gradients flow through every
    vector. The model itself is not touched: several threads may do this at once, while others use it as it is.

    Args:
        model: a SentenceTransformer, or one within DistributedDataParallel or torch.compile (which runs uncompiled
            here).
        features: one batch of texts as ``model.preprocess`` makes it; it is not changed.
        layers: depths from 1 to the model's, in any order.
        projections: by depth, applied to the pooled vectors.

    Returns:
        ``{depth: [B, dims]}``, not normalised, shallow first.

    Raises:
        UnsupportedEncoderError: the model has no layers to cut.
        LadderError: no depths, or one that the model does not have.
        OptionError: the model's ``max_seq_length`` lets texts through that it has no positions for.
    """
    return pooled_taps(Encoder.of(model), features, layers, projections or {})


def pooled_taps(
    encoder: Encoder, features: Mapping[str, Any], layers: Iterable[int], projections: Mapping[int, Any]
) -> dict[int, Tensor]:
    """`taps` of an encoder whose parts are known."""
    pooled = {number: encoder.pool(features, states) for number, states in _states(encoder, features, layers).items()}
    return {number: projections[number](x) if number in projections else x for number, x in pooled.items()}


def token_taps(model: nn.Module, features: Mapping[str, Any], layers: Iterable[int]) -> dict[int, Tensor]:
    """What `taps` pools: the token vectors of each depth's model, ``{depth: [B, T, H]}``, shallow first.

    Raises:
        UnsupportedEncoderError, LadderError: as `taps`.
    """
    return _states(Encoder.of(model), features, layers)


def _states(encoder: Encoder, features: Mapping[str, Any], layers: Iterable[int]) -> dict[int, Tensor]:
    asked, known = set(layers), range(1, encoder.depth + 1)
    if not asked or any(isinstance(layer, bool) or layer not in known for layer in asked):
        raise LadderError(f"cannot tap layers {sorted(asked, key=str)}: expected some of 1 to {encoder.depth}")
    wanted = sorted(map(int, asked))
    encoder.check_length(features)
    *between, deepest = wanted
    with encoder.running(deepest, set(between)) as (runs, states):
        output = runs(dict(features))  # modules add keys to what they are given
    # The deepest state is taken from the output, behind what wrappers do to it: DistributedDataParallel wants the loss
    # to depend on what it returned.
    last = output["token_embeddings"]
    return {number: encoder.ended(number, states[number], last) for number in between} | {deepest: last}
