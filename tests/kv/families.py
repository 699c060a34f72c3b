"""Tiny random models of every supported family, made in milliseconds, and caches of them."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nestling import kv
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.bases import LayerBases
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.storage import Storage
from nestling.kv.cache.window import TOKENS_PER_BLOCK

BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,  # random models attend to something, and greedy ties do not happen
)
FAMILIES = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 24,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "partial-rotary": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    ),
    "moe": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}

MORE = {  # that are served beside these
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "cohere": ("cohere", {}),
    "glm": ("glm", {"head_dim": 16}),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": None}),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random model in eval mode."""
    kind, extra = (FAMILIES | MORE)[family]
    config = CONFIG_MAPPING[kind](**{**BASE, **extra, **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_fit(model, ids: torch.Tensor, **options):
    """An adapter for a tiny model, calibrated on ids ``[n, 64]`` for caches that compress all but the sinks."""
    given = {
        "basis": "balanced",
        "length": 64,
        "sensitivity_windows": 4,
        "sensitivity_length": 32,
        "window": 0,
        **options,
    }
    return kv.fit(model, None, ids, kv.FitConfig(**given), progress=False)


def nested_cache(model, adapter, budget=None, *, paper: bool = False, **options) -> NestedCache:
    """A cache of ranks in the model's own precision, unless the options say otherwise.

    Args:
        paper: the options of `CacheConfig.paper`.
    """
    if not options.get("quantise") and not (isinstance(budget, Allocation) and budget.quantised):
        options = {"dtype": model.dtype, **options}
    options = {"budget": budget, "quantise": False, **options}
    return NestedCache(model, adapter, CacheConfig.paper(**options) if paper else CacheConfig(**options))


def cache_of_bases(
    bases, allocation, config, *, sinks=0, window=0, block=TOKENS_PER_BLOCK, dtype=torch.float32, **options
):
    """A cache from bases by layer index, without a model."""
    cache = NestedCache.__new__(NestedCache)
    rows = list(bases.values())

    def of_row(row, members):
        return LayerBases.of(rows[row], members, half=dtype.itemsize == 2)

    cache._assemble(
        list(bases), of_row, allocation, config, Storage(sinks, window, block), dtype, CacheConfig(**options)
    )
    return cache
