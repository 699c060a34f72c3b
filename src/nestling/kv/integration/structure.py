"""What a model's config says: its decoder, the layers whose caches grow with the text, the shape of their heads."""

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nestling.errors import UnsupportedModelError

# Cache layers of transformers that do not grow with the text, or hold nothing.
BOUNDED = {
    "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer",
}  # fmt: skip
DROPS_CACHE = ("phi3", "phimoe", "phi4_multimodal")  # at their original length, whatever their RoPE


def text_config(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's config of a model (the text part of a multimodal one)."""
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    return config.get_text_config(decoder=True)


def longest_text(model_or_config: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The tokens that a model reads at most, where its config tells it: under one of two names."""
    config = text_config(model_or_config)
    names = ("max_position_embeddings", "max_target_positions")  # the second of decoders of speech
    return next((limit for name in names if (limit := getattr(config, name, None))), None)


def stock_layers(config: PreTrainedConfig) -> list:
    """One stock, empty cache layer per model layer, of the kind that transformers picks for it."""
    return DynamicCache(config=config).layers


def compressible_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers with full attention, the ones whose cache grows with the text.

    Sliding-window, chunked and linear layers have bounded caches and keep their stock layer.

    Raises:
        UnsupportedModelError: for models that are not served, with the reason, as far as a config tells it; the rest
            is seen when a model runs, see `nestling.kv.integration.support`.
    """
    name = f"model type '{config.model_type}'"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder, whose cross-attention caches are not compressed")
    if _says(config, "kv_lora_rank"):
        raise UnsupportedModelError(
            f"{name} uses latent attention (MLA): keys and values are expanded from one smaller vector"
        )
    if _says(config, "attn_logit_softcapping"):
        raise UnsupportedModelError(f"{name} soft-caps its attention logits, which SDPA cannot do")
    if config.model_type in ("gpt_oss",) or _says(config, "attention_sinks"):
        raise UnsupportedModelError(f"{name} adds sink logits to its softmax, which SDPA cannot do")
    if _says(config, "num_kv_shared_layers") or any(getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModelError(
            f"{name} shares keys and values between layers, so some layers read another layer's cache"
        )
    layers = stock_layers(config)
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if full:
        return full
    if growing := sorted({type(layer).__name__ for layer in layers} - BOUNDED):
        raise UnsupportedModelError(
            f"{name} keeps more than keys and values in its cache ({', '.join(growing)}), such as a "
            "recurrent state, a summary or an index of the tokens to read"
        )
    raise UnsupportedModelError(
        f"{name} has no full-attention layer, so its cache does not grow and there is nothing to compress"
    )


def layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """The config that the modules of a layer have: the model's own, or one for each layer where those differ."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _says(config: PreTrainedConfig, name: str) -> bool:
    """Whether a config, or that of any layer, has something true by that name."""
    layers = range(config.num_hidden_layers) if getattr(config, "is_heterogeneous", False) else (0,)
    return any(getattr(layer_config(config, i), name, None) for i in layers)


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension of the layers that are compressed.

    Raises:
        UnsupportedModelError: if they differ between those.
    """
    shapes = {_head_shape(layer_config(config, i)) for i in compressible_layers(config)}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"model type '{config.model_type}' has layers with heads of different shapes")
    return shapes.pop()


def _head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(f"model type '{config.model_type}' has no attention heads")
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


def rotary_limit(config: PreTrainedConfig) -> int | None:
    """The length of text at which a model rotates all keys anew (long RoPE), so that those a cache holds are void.

    transformers' ``generate`` then drops the cache that it was given, and reads the whole text into one of its own.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    long = [part for part in parts if part.get("rope_type") == "longrope"]
    if not long and config.model_type not in DROPS_CACHE:
        return None
    inside = [part["original_max_position_embeddings"] for part in long if "original_max_position_embeddings" in part]
    return getattr(config, "original_max_position_embeddings", None) or min(inside, default=None)
