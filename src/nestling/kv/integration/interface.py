"""What transformers calls: the attention function named ``nestling``, and the keyword by which a cache is passed.

No modelling code is patched. The function hands over to whatever object the cache returned in place of keys and
values, and to stock SDPA for plain tensors (training, ``use_cache=False``, sliding-window layers, other caches). It is
registered when this file is imported, which unpickling an attached model does: it remembers an object of this file.
"""

import warnings
from inspect import signature
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from nestling.errors import UnsupportedModelError

NAME = "nestling"
EXTRAS = ("s_aux", "sinks", "softcap", "position_bias", "indices")  # what SDPA or a handle would leave out in silence


class Before(str):
    """The attention implementation that a model had before it was attached: kept on the model, and pickled with it."""


class Handle(Protocol):
    """What a cache layer returns in place of keys and values: it knows how to attend to its own history."""

    def attend(self, module, query: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]`` of ``query`` ``[B, Hq, Tq, D]`` under an SDPA mask."""
        ...


def sdpa(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
    """transformers' own SDPA attention: ``[B, Tq, Hq, D]`` from unrepeated keys and values ``[B, Hkv, T, D]``."""
    return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)[0]


def attention_forward(module, query, key, value, attention_mask, nested=None, output_attentions=False, **kwargs):
    """The registered attention function: a handle attends by itself, plain tensors go to SDPA.

    ``nested`` is what `nestling.kv.simulation.student` gives to the model's forward: it attends to plain keys and
    values, cut. Asked for attention weights, it has those of plain tensors ``[B, Hq, Tq, T]``, as eager attention
    would.

    Raises:
        UnsupportedModelError: if the model's attention is more than a softmax of scaled products.
    """
    if extra := [name for name in EXTRAS if kwargs.get(name) is not None]:
        raise UnsupportedModelError(f"{type(module).__name__} passes {', '.join(extra)} to its attention: not tested")
    if nested is not None:
        return nested.attend(module, query, key, value, attention_mask, **kwargs), None
    if isinstance(key, Tensor):
        out = sdpa(module, query, key, value, attention_mask, **kwargs)
        return out, attention_weights(module, query, key, attention_mask, **kwargs) if output_attentions else None
    if output_attentions:
        warnings.warn(
            "output_attentions=True: a nested cache gives no attention weights; read the text with a stock cache, or "
            "without one, to have them",
            stacklevel=2,
        )
    return key.attend(module, query, attention_mask, **kwargs).contiguous(), None  # as SDPA's output is


def attention_weights(
    module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None = None, is_causal=None, **kwargs
) -> Tensor:
    """The weights ``[B, Hq, Tq, T]`` by which `sdpa` reads, of queries ``[B, Hq, Tq, D]``, keys ``[B, Hkv, T, D]``."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else (scores + mask).clamp_min(hidden)
    return scores.softmax(-1).to(query.dtype)


# Without a mask function of the same name transformers passes no mask at all, and padded batches go wrong in silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def cached(model, cache: Cache) -> dict[str, Cache]:
    """The cache as the argument of ``forward`` and ``generate``: ``cache`` from transformers 5.24 on.

    Before, it is ``past_key_values``. Use as ``model(input_ids=ids, **cached(model, cache))``.
    """
    names = signature(base_model(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def base_model(model) -> PreTrainedModel:
    """The model of transformers in a compiled or a PEFT model; LoRA layers are within it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


class PassThroughLayer(CacheLayerMixin):
    """A cache layer without history, for passes that read each window once: subclasses say what `update` returns."""

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1
