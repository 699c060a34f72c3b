"""Quantised caches to compare with, at the bytes that they really take, scales included.

`int_cache` is ours and as good as plain round-to-nearest gets without calibration: nothing is quantised twice and no
token stays in full precision. `quanto_cache` and `hqq_cache` are transformers' own `QuantizedCache`, given bf16
whatever the model computes in, since they keep scales and recent tokens in the dtype that they are given.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from nestling.kv import attention

GROUP = 32  # elements of a head that share an int4 scale and minimum


def int_cache(config: PreTrainedConfig, bits: int) -> Cache:
    """An append-only cache of packed 8- or 4-bit integers in the full-attention layers; stock layers elsewhere.

    Bytes per token and head of width D, keys and values each: ``D + 2`` at 8 bits (`quantise8`) and
    ``D / 2 + 4 D / 32`` at 4 bits (`quantise4`): 3.1 % and 25 % more than the integers alone, for D = 64.
    """
    config = config.get_text_config(decoder=True)
    layers = attention.stock_layers(config)
    for index in attention.compressible_layers(config):
        layers[index] = IntLayer(bits)
    return Cache(layers=layers)


def quanto_cache(config: PreTrainedConfig, bits: int = 4, **options) -> Cache:
    """transformers' `QuantizedCache` with quanto and its defaults: groups of 64, up to 127 recent tokens exact."""
    return _quantised(_Quanto, config, bits, options)


def hqq_cache(config: PreTrainedConfig, bits: int = 4, **options) -> Cache:
    """The same with hqq, grouped along its better axis: the default one has ten times the KL at the same bytes."""
    return _quantised(_HQQ, config, bits, {"axis_key": 1, "axis_value": 1, **options})


def quantise8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a token and head: codes int8 ``[..., D]`` and scale fp16 ``[..., 1]``; x = code * scale."""
    states = states.float()
    scale = (states.abs().amax(-1, keepdim=True) / 127).half()
    return (states / _divisor(scale)).round().clamp(-127, 127).to(torch.int8), scale


def dequantise8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.float()


def quantise4(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric in groups of gcd(32, D) of ``[..., D]``: packed codes, scale, minimum; x = code * scale + minimum.

    Returns:
        uint8 ``[..., D / 2]`` (even places in the low half of a byte), fp16 ``[..., D / 32]``, fp16 ``[..., D / 32]``.
    """
    groups = states.float().unflatten(-1, (-1, math.gcd(GROUP, states.shape[-1])))
    minimum = groups.amin(-1, keepdim=True).half()
    scale = ((groups.amax(-1, keepdim=True) - minimum.float()).clamp(min=0) / 15).half()
    codes = ((groups - minimum.float()) / _divisor(scale)).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.squeeze(-1), minimum.squeeze(-1)


def dequantise4(packed: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)).flatten(-2)


def _divisor(scale: Tensor) -> Tensor:
    scale = scale.float()
    return scale.masked_fill(scale == 0, 1)  # a group of equal values


SCHEMES = {8: (quantise8, dequantise8), 4: (quantise4, dequantise4)}


class IntLayer(CacheLayerMixin):
    """One layer's keys and values as packed integers; `update` returns all of them dequantised ``[B, H, T, D]``."""

    is_sliding = False
    is_croppable = True

    def __init__(self, bits: int):
        super().__init__()
        if bits not in SCHEMES:
            raise ValueError(f"bits must be one of {sorted(SCHEMES)}, got {bits}")
        self.quantise, self.dequantise = SCHEMES[bits]
        self.parts: list[list[Tensor]] = []  # of keys, of values: codes and scales, each [B, H, T, ...]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = [list(self.quantise(states)) for states in (key_states, value_states)]
        if self.parts:
            pairs = [zip(old, fresh, strict=True) for old, fresh in zip(self.parts, new, strict=True)]
            new = [[torch.cat(pair, -2) for pair in side] for side in pairs]
        self.parts = new
        keys, values = (self.dequantise(*side).to(self.dtype) for side in new)
        return keys, values

    def get_seq_length(self) -> int:
        return self.parts[0][0].shape[-2] if self.parts else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _apply(self, change) -> None:
        self.parts = [[change(part) for part in side] for side in self.parts]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as in transformers."""
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        self._apply(lambda part: part[:, :, :left].clone())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda part: part[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def reset(self) -> None:
        self.parts, self.is_initialized = [], False


class _Bf16:
    """Before a cache layer: it is given bf16, and what it returns is cast back to the model's dtype."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.bfloat16(), value_states.bfloat16(), *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class _Quanto(_Bf16, QuantoQuantizedLayer):
    pass


class _HQQ(_Bf16, HQQQuantizedLayer):
    pass


def _quantised(kind: type, config: PreTrainedConfig, bits: int, options: dict) -> Cache:
    layers = attention.stock_layers(config.get_text_config(decoder=True))
    if other := {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}:
        raise ValueError(f"QuantizedCache serves full attention only; this model has {', '.join(sorted(other))}")
    return Cache(layers=[kind(nbits=bits, **options) for _ in layers])
