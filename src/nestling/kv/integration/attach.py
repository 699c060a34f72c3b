"""The seam to transformers: which models can be served, and how they are switched to our attention and back.

Everything that depends on how transformers calls an attention function, describes a model or names an argument is
reached through this file; its parts are in `structure` (configs), `interface` (what transformers calls), `state` (what
is put back), `support` (which models) and `output_maps`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from nestling.errors import UnsupportedModelError
from nestling.kv.integration.interface import (
    EXTRAS,
    NAME,
    Before,
    Handle,
    PassThroughLayer,
    attention_forward,
    base_model,
    cached,
    sdpa,
)
from nestling.kv.integration.modes import default_mode
from nestling.kv.integration.output_maps import each_output_projection, output_projections
from nestling.kv.integration.state import (
    as_found,
    decoder_part,
    implementation,
    input_device,
    layer_devices,
    leaves_as_found,
    switch,
)
from nestling.kv.integration.structure import (
    compressible_layers,
    fingerprint,
    head_shape,
    layer_config,
    longest_text,
    rotary_limit,
    stock_layers,
    text_config,
)
from nestling.kv.integration.support import supports

__all__ = [
    "EXTRAS",
    "NAME",
    "Handle",
    "PassThroughLayer",
    "UnsupportedModelError",
    "as_found",
    "attach",
    "attention_forward",
    "base_model",
    "cached",
    "check_head",
    "check_support",
    "compressible_layers",
    "decoder_and_head",
    "detach",
    "each_output_projection",
    "fingerprint",
    "head_shape",
    "implementation",
    "input_device",
    "layer_config",
    "layer_devices",
    "leaves_as_found",
    "longest_text",
    "logits_of_last",
    "output_projections",
    "rotary_limit",
    "sdpa",
    "served",
    "stock_layers",
    "supports",
    "text_config",
    "warn_of_rotation",
]

BEFORE = "_attention_before_nestling"  # what an attached model remembers


def check_support(model) -> None:
    """Raise `UnsupportedModelError` with the reason, if there is one; see `supports`."""
    if reason := supports(model):
        raise UnsupportedModelError(reason)


def attach(model: PreTrainedModel) -> None:
    """Switch ``model`` to the ``nestling`` attention function. Idempotent; plain caches keep working.

    `detach` puts back what was. Attention weights (``output_attentions=True``) are still there with plain caches.

    Raises:
        UnsupportedModelError: if the model is not served, with the reason; it is left as it was.
    """
    check_support(model)
    lm = base_model(model)
    before = implementation(lm)
    if before == NAME:
        return
    decoder_part(lm).set_attn_implementation(NAME)
    if implementation(lm) != NAME:
        raise UnsupportedModelError(f"{type(lm).__name__}: its attention cannot be switched")
    setattr(lm, BEFORE, Before(before))


def warn_of_rotation(model, stacklevel: int = 2) -> None:
    """Say of a long-RoPE model that transformers' ``generate`` will drop the caches that it is given.

    Args:
        stacklevel: as for `warnings.warn`.
    """
    config = text_config(base_model(model))
    limit = rotary_limit(config)
    if limit is not None and limit < (longest_text(config) or 0):
        warnings.warn(
            f"{config.model_type} rotates all keys anew when a text passes {limit} tokens: from there on generate() "
            "drops the cache it was given and goes on with a stock one of full size. Keep prompt and answer below",
            stacklevel=stacklevel + 1,
        )


def detach(model: PreTrainedModel) -> None:
    """Switch ``model`` back to the attention implementation that it had before `attach`. Idempotent.

    Nested caches cannot be read by it from then on, until it is attached again.
    """
    lm = base_model(model)
    if isinstance(lm, PreTrainedModel) and implementation(lm) == NAME:
        switch(lm, str(lm.__dict__.pop(BEFORE, "sdpa")))


@contextmanager
def served(model) -> Iterator[None]:
    """Within it the model is in eval mode and attends through the seam, without gradients, autocast or inference mode.

    Its modes and its implementation are restored afterwards.

    Raises:
        UnsupportedModelError: if it is not served, with the reason.
    """
    check_support(model)
    with as_found(model), default_mode(gradients=False):
        model.eval()
        switch(model, NAME)
        yield


def decoder_and_head(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The part of a causal LM that ends in hidden states, and its map from those to logits."""
    return model.get_decoder(), model.get_output_embeddings()


@torch.no_grad()
def check_head(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise `UnsupportedModelError` if the logits are more than the output map of the last hidden states.

    Logits that are scaled or soft-capped afterwards would be distilled without that.
    """
    decoder, head = decoder_and_head(model)
    ours = head(decoder(input_ids=input_ids, use_cache=False).last_hidden_state)
    theirs = model(input_ids=input_ids, use_cache=False).logits
    scale = float(theirs.float().abs().max())  # NaN is another matter
    if scale == scale and not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * scale):
        raise UnsupportedModelError(f"{type(model).__name__} scales or caps its logits: its training is not tested")


@torch.no_grad()
def logits_of_last(model: PreTrainedModel, input_ids: Tensor, cache: Cache, **kwargs):
    """A forward that computes one position's logits only: for passes that need the cache, not the logits."""
    if "logits_to_keep" in signature(base_model(model).forward).parameters:
        kwargs["logits_to_keep"] = 1
    return model(input_ids=input_ids, use_cache=True, **cached(model, cache), **kwargs)
