"""Which models are served: what their configs say, and what they do with a few tokens.

They are read twice, the second time as with a nested cache: a text of `PROMPT` tokens, then one token more. Every
layer that would be compressed has to ask for its cache once, and to hand what it gets to the attention function: from
a module that knows the layer's number, with heads of the shape that the config tells, and under a mask that hides what
lies ahead and nothing else. And both readings have to give the same logits.
"""

import threading
import weakref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from nestling.errors import UnsupportedModelError
from nestling.kv.integration.interface import NAME, PassThroughLayer, base_model, cached, sdpa
from nestling.kv.integration.modes import default_mode
from nestling.kv.integration.state import as_found, decoder_part, forgotten, input_device, switch
from nestling.kv.integration.structure import fingerprint, head_shape, stock_layers, text_config

PROMPT = 4  # tokens
# What models hand to their attention that makes no difference to it, beside what `CachedStates.attend` looks at.
HARMLESS = {"dropout", "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits"}

_passed: weakref.WeakKeyDictionary[PreTrainedModel, dict] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def supports(model) -> str | None:
    """None if the model's KV cache can be nested, and otherwise the reason why not.

    A few tokens are read to find out, the first time that a model is asked about; nothing of it is left behind.
    """
    if reason := _prompt_learning(model):
        return reason
    lm = base_model(model)
    if not isinstance(lm, PreTrainedModel):
        return f"{type(lm).__name__} is not a language model of transformers"
    try:
        known = fingerprint(text_config(lm))
        with _lock:
            if _passed.get(lm) != known:
                _check_implementation(lm)
                _check_reading(lm)
                _passed[lm] = known
    except UnsupportedModelError as error:
        return str(error)
    return None


def _prompt_learning(model) -> str | None:
    """PEFT's prefixes and prompts: they go before the text, in a cache or in tokens that nobody else knows of."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            return f"the model has {kind} (PEFT): it adds its own prefix before the text, outside of the cache"
    return None


def _check_implementation(lm: PreTrainedModel) -> None:
    if not lm._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(lm).__name__} does not use transformers' attention interface, so its attention cannot be replaced"
        )
    for model in (lm, decoder_part(lm)):
        if not model._supports_sdpa:
            raise UnsupportedModelError(f"{type(model).__name__} does not support SDPA, which reads the cache")


def _check_reading(lm: PreTrainedModel) -> None:
    """Read a few tokens in both ways, and put everything back."""
    config, name = text_config(lm), type(lm).__name__
    ids = torch.tensor([_plain_ids(config)], device=input_device(lm))
    traced = {i: _Layer(i, head_shape(config)) for i in fingerprint(config)["layers"]}
    with as_found(lm), forgotten(lm), default_mode(gradients=False):
        lm.eval()
        switch(lm, "sdpa")
        try:
            expected = _logits(lm, ids, stock_layers(config))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(f"{name} cannot read text with a stock cache: {_short(error)}") from error
        switch(lm, NAME)
        try:
            logits = _logits(lm, ids, [traced.get(i, layer) for i, layer in enumerate(stock_layers(config))])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name}: {error}") from error
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} computes with the keys and values that its cache returns, which a nested cache does not "
                f"rebuild: {_short(error)}"
            ) from error
    if unread := [str(i) for i, layer in traced.items() if layer.reads != 2]:
        raise UnsupportedModelError(
            f"{name} does not read the cache of layers {', '.join(unread)} exactly once a call, as full attention does"
        )
    if not _same(logits, expected):
        raise UnsupportedModelError(
            f"{name} gives other logits with nestling's attention: they differ by up to "
            f"{float((logits - expected).abs().max()):.2g}, and the largest is {float(expected.abs().max()):.2g}"
        )


def _plain_ids(config) -> list[int]:
    """A few token ids that mean nothing special."""
    special = {v for k, v in config.to_dict().items() if k.endswith(("_id", "_index")) and isinstance(v, int)}
    plain = [i for i in range(3, config.vocab_size) if i not in special]
    return (plain or [0])[: PROMPT + 1]


def _logits(lm: PreTrainedModel, ids: Tensor, layers: list) -> Tensor:
    cache = Cache(layers=layers)
    logits = []
    for part in ids.split(PROMPT, 1):
        output = lm(input_ids=part, use_cache=True, **cached(lm, cache))
        logits.append(output.logits)
    return torch.cat(logits, 1).float()


def _same(logits: Tensor, expected: Tensor) -> bool:
    """The same kernels read the same tensors, so rounding alone may differ, if anything; NaN is another matter."""
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


class _Layer(PassThroughLayer):
    """A cache layer that keeps everything, and looks at how it is read."""

    def __init__(self, index: int, shape: tuple[int, int, int]):
        super().__init__()
        self.index, self.shape, self.reads = index, shape, 0
        self.held: tuple[Tensor, ...] = ()

    def update(self, key_states, value_states, *args, **kwargs):
        new = key_states, value_states
        if odd := {type(states).__name__ for states in new if type(states) is not Tensor}:
            raise UnsupportedModelError(
                f"its keys and values are {', '.join(odd)} objects, which a cache cannot store"
            )
        self.held = tuple(torch.cat(pair, -2) for pair in zip(self.held, new, strict=True)) if self.held else new
        reader = CachedStates(self)
        return reader, reader

    def get_seq_length(self):
        return self.held[0].shape[-2] if self.held else 0

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0


class CachedStates:
    """What such a layer gives in place of keys and values."""

    def __init__(self, layer: _Layer):
        self._layer = layer

    def attend(self, module, query: Tensor, mask: Tensor | None, scaling=None, is_causal=None, **kwargs) -> Tensor:
        layer, (key, value) = self._layer, self._layer.held
        who = f"{type(module).__name__} of layer {layer.index}"
        layer.reads += 1
        if getattr(module, "layer_idx", None) != layer.index:
            raise UnsupportedModelError(f"{who} has a module with another layer number, or with none")
        if extra := sorted(name for name, v in kwargs.items() if name not in HARMLESS and v not in (None, False)):
            raise UnsupportedModelError(f"{who} passes {', '.join(extra)} to its attention: not tested")
        if not isinstance(scaling, float | int):
            raise UnsupportedModelError(f"{who} does not pass the scale of its logits")
        heads, kv_heads, width = layer.shape
        passed, wanted = [_heads(x) for x in (query, key, value)], [(heads, width), *[(kv_heads, width)] * 2]
        if passed != wanted:
            raise UnsupportedModelError(
                f"{who} has queries, keys and values of [heads, width] = {passed}, where its config says {wanted}"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not _is_causal(mask, query.shape[2], key.shape[2], causal):
            raise UnsupportedModelError(f"{who} does not read exactly the tokens so far, all alike")
        return sdpa(module, query, key, value, mask, scaling=scaling, is_causal=is_causal)


def _heads(states: Tensor) -> tuple[int, int]:
    return states.shape[1], states.shape[-1]


def _is_causal(mask: Tensor | None, queries: int, tokens: int, causal: bool) -> bool:
    """Whether each of the last ``queries`` tokens reads itself and all before it, and nothing else."""
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    if mask is None:
        return queries == 1 or (causal and queries == tokens)
    mask = mask.cpu()
    if mask.dtype != torch.bool:
        if ((mask != 0) & (mask > -1e4)).any():
            return False
        mask = mask == 0
    return mask.shape[1] == 1 and bool((mask == seen).all())
