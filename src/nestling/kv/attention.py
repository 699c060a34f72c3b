"""The seam to transformers: which models can be served, and the attention function they are switched to.

Everything that depends on how transformers calls an attention function or describes a model lives in this file.
No modelling code is patched: `attach` registers one attention and one mask function under the name ``nestling`` and
switches the model to it. The function hands over to whatever object the cache returned in place of keys and values,
and to stock SDPA for plain tensors (training, ``use_cache=False``, sliding-window layers, other caches).
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.pytorch_utils import Conv1D

from nestling.errors import UnsupportedModelError

NAME = "nestling"
EXTRAS = ("s_aux", "sinks", "softcap", "position_bias", "indices")  # what SDPA or a handle would leave out in silence


class Handle(Protocol):
    """What a cache layer returns in place of keys and values: it knows how to attend to its own history."""

    def attend(self, module, query: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]`` of ``query`` ``[B, Hq, Tq, D]`` under an SDPA mask."""
        ...


def sdpa(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
    """transformers' own SDPA attention: ``[B, Tq, Hq, D]`` from unrepeated keys and values ``[B, Hkv, T, D]``."""
    return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)[0]


def attention_forward(module, query, key, value, attention_mask, nested=None, **kwargs):
    """The registered attention function: a handle attends by itself, plain tensors go to SDPA.

    ``nested`` is what `nestling.kv.student` gives to the model's forward: it attends to plain keys and values, cut.

    Raises:
        UnsupportedModelError: if the model's attention is more than a softmax of scaled products.
    """
    if extra := [name for name in EXTRAS if kwargs.get(name) is not None]:
        raise UnsupportedModelError(f"{type(module).__name__} passes {', '.join(extra)} to its attention: not tested")
    if nested is not None:
        return nested.attend(module, query, key, value, attention_mask, **kwargs), None
    if isinstance(key, Tensor):
        return sdpa(module, query, key, value, attention_mask, **kwargs), None
    return key.attend(module, query, attention_mask, **kwargs), None


def attach(model: PreTrainedModel) -> None:
    """Switch ``model`` to the ``nestling`` attention function. Idempotent; plain caches keep working.

    The mask function must be registered under the same name: transformers passes no mask at all to an attention
    function without one, and padded batches go wrong with no error.

    Raises:
        UnsupportedModelError: if the model does not route its attention through transformers' interface.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    if text_config(model)._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if text_config(model)._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface: its attention cannot be switched"
        )


class served:
    """Within it the model is in eval mode and attends through the seam; its mode is restored afterwards."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        attach(self.model)
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *exc):
        self.model.train(self.training)


def text_config(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's config of a model (the text part of a multimodal one)."""
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    return config.get_text_config(decoder=True)


def stock_layers(config: PreTrainedConfig) -> list:
    """One stock, empty cache layer per model layer, of the kind that transformers picks for it."""
    return DynamicCache(config=config).layers


def compressible_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers with full attention, the ones whose cache grows with the text.

    Sliding-window, chunked and linear layers have bounded caches and keep their stock layer.

    Raises:
        UnsupportedModelError: for models that are not (yet) served, with the reason.
    """
    name = f"model type '{config.model_type}'"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder: cross-attention caches are not compressed")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} has latent attention (MLA): its cache is low-rank already")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{name} soft-caps its attention logits: not tested with SDPA")
    if config.model_type in ("gpt_oss",) or getattr(config, "attention_sinks", None):
        raise UnsupportedModelError(f"{name} adds sink logits to its softmax: not tested")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers: not tested")
    layers = [i for i, layer in enumerate(stock_layers(config)) if type(layer) is DynamicLayer]
    if not layers:
        raise UnsupportedModelError(
            f"{name} has no full-attention layer: its cache does not grow, nothing to compress"
        )
    return layers


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def fingerprint(config: PreTrainedConfig) -> dict:
    """What an adapter has to agree on with a model: plain JSON values."""
    heads, kv_heads, head_dim = head_shape(config)
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "rope": {str(k): v for k, v in rope.items()},
        "layers": compressible_layers(config),
    }


def output_projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """The weight ``[hidden, Hq * D]`` of each attention module's output projection, by layer index.

    Attention modules are those with a ``layer_idx`` and a ``scaling``; their output map goes by one of a few names in
    transformers. Layers where none is found are absent.
    """
    config = text_config(model)
    heads, _, head_dim = head_shape(config)
    found: dict[int, Tensor] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index is None or not hasattr(module, "scaling"):
            continue
        for name in ("o_proj", "dense", "out_proj", "wo", "c_proj"):
            projection = getattr(module, name, None)
            weight = getattr(projection, "weight", None)
            if isinstance(projection, Conv1D) and weight is not None:
                weight = weight.mT  # GPT-2 keeps [in, out]
            if isinstance(weight, Tensor) and weight.shape[-1] == heads * head_dim:
                found[index] = weight.detach()
    return found


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
def logits_of_last(model: PreTrainedModel, input_ids: Tensor, **kwargs):
    """A forward that computes one position's logits only: for passes that need the cache, not the logits."""
    return model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **kwargs)
