"""Quantised caches to compare with, at the bytes that they really take, scales included.

`int_cache` is ours and as good as plain round-to-nearest gets without calibration: nothing is quantised twice and no
token stays in full precision. `quanto_cache` and `hqq_cache` are transformers' own `QuantizedCache`, given bf16
whatever the model computes in, since they keep scales and recent tokens in the dtype that they are given.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from nestling import kv
from nestling.kv.integration.attach import compressible_layers, stock_layers
from nestling.kv.quantisation.packing import pack, unpack

GROUP = 32  # elements that share a scale and a minimum


def int_cache(config: PreTrainedConfig, bits: int, rotate: bool = False) -> Cache:
    """An append-only cache of packed integers of 2, 3, 4 or 8 bits in the full-attention layers; stock ones elsewhere.

    Bytes per token and head of width D, keys and values each: ``D + 2`` at 8 bits (one scale) and ``bits * D / 8 +
    4 D / 32`` below (groups of 32 along the head). ``rotate`` turns heads by a Hadamard matrix first, which spreads
    outliers over all coordinates; their width must be a power of two.
    """
    config = config.get_text_config(decoder=True)
    layers = stock_layers(config)
    for index in compressible_layers(config):
        layers[index] = IntLayer(bits, rotate)
    return Cache(layers=layers)


def kivi_cache(config: PreTrainedConfig, bits: int) -> Cache:
    """The same with keys quantised by channel in groups of 32 tokens, as KIVI does; up to 31 recent ones are exact."""
    config = config.get_text_config(decoder=True)
    layers = stock_layers(config)
    for index in compressible_layers(config):
        layers[index] = KiviLayer(bits)
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


def quantise_groups(states: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric in groups of gcd(32, D) of ``[..., t, D]``: packed codes, scale, minimum; x = code * scale + minimum.

    Returns:
        uint8 ``[..., t, bits * D / 8]`` (see `nestling.kv.quantisation.packing`), fp16 ``[..., t, D / 32]`` twice.
    """
    groups = states.float().unflatten(-1, (-1, math.gcd(GROUP, states.shape[-1])))
    minimum = groups.amin(-1, keepdim=True).half()
    most = (1 << bits) - 1
    scale = ((groups.amax(-1, keepdim=True) - minimum.float()).clamp(min=0) / most).half()
    codes = ((groups - minimum.float()) / _divisor(scale)).round().clamp(0, most).to(torch.uint8).flatten(-2)
    packed = pack(codes.mT, (bits,) * (states.shape[-1] // 8)).mT
    return packed, scale.squeeze(-1), minimum.squeeze(-1)


def dequantise_groups(packed: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    codes = unpack(packed.mT, (bits,) * (packed.shape[-1] // bits)).mT
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)).flatten(-2)


def _divisor(scale: Tensor) -> Tensor:
    scale = scale.float()
    return scale.masked_fill(scale == 0, 1)  # a group of equal values


def scheme(bits: int) -> tuple[Callable, Callable]:
    """Functions that quantise and come back."""
    if bits == 8:
        return quantise8, dequantise8
    if bits not in (2, 3, 4):
        raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits}")
    return partial(quantise_groups, bits=bits), partial(dequantise_groups, bits=bits)


def hadamard(width: int, device: torch.device) -> Tensor:
    """The orthogonal Hadamard matrix of that width, its own inverse."""
    if width & (width - 1):
        raise ValueError(f"there is no Hadamard matrix of width {width} here: it must be a power of two")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(width)


class IntLayer(CacheLayerMixin):
    """One layer's keys and values as packed integers; `update` returns all of them dequantised ``[B, H, T, D]``."""

    is_sliding = False
    is_croppable = True

    def __init__(self, bits: int, rotate: bool = False):
        super().__init__()
        self.quantise, self.dequantise = scheme(bits)
        self.rotate = rotate
        self.parts: list[list[Tensor]] = []  # of keys, of values: codes and scales, each [B, H, T, ...]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turn = hadamard(key_states.shape[-1], key_states.device) if self.rotate else None
        given = [states if turn is None else states.float() @ turn for states in (key_states, value_states)]
        new = [list(self.quantise(states)) for states in given]
        if self.parts:
            pairs = [zip(old, fresh, strict=True) for old, fresh in zip(self.parts, new, strict=True)]
            new = [[torch.cat(pair, -2) for pair in side] for side in pairs]
        self.parts = new
        found = [self.dequantise(*side) for side in new]
        keys, values = ((states if turn is None else states @ turn).to(self.dtype) for states in found)
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


class KiviLayer(IntLayer):
    """Keys by channel: groups are 32 tokens of one coordinate, and tokens wait in full precision for a whole one."""

    is_croppable = False

    def __init__(self, bits: int):
        super().__init__(bits)
        self.recent: Tensor | None = None  # keys that wait, bf16
        self.keys: list[Tensor] = []  # codes and scales ``[B, H, D, groups, ...]``

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = list(self.quantise(value_states))
        self.parts = [
            [torch.cat(pair, -2) for pair in zip(self.parts[0], fresh, strict=True)] if self.parts else fresh
        ]
        recent = key_states.bfloat16() if self.recent is None else torch.cat((self.recent, key_states.bfloat16()), 2)
        whole = recent.shape[2] // GROUP * GROUP
        if whole:
            groups = recent[:, :, :whole].mT.unflatten(-1, (-1, GROUP))  # packed one by one, to be appended to
            new = list(self.quantise(groups))
            self.keys = [torch.cat(pair, -2) for pair in zip(self.keys, new, strict=True)] if self.keys else new
        self.recent = recent[:, :, whole:].clone()
        old = [self.dequantise(*self.keys).flatten(-2).mT] if self.keys else []
        keys = torch.cat((*old, self.recent.float()), 2)
        return keys.to(self.dtype), self.dequantise(*self.parts[0]).to(self.dtype)

    def _apply(self, change) -> None:
        super()._apply(change)
        self.keys = [change(part) for part in self.keys]
        self.recent = None if self.recent is None else change(self.recent)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("tokens of a whole group cannot be taken out of it")

    def reset(self) -> None:
        super().reset()
        self.recent, self.keys = None, []


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
    layers = stock_layers(config.get_text_config(decoder=True))
    if other := {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}:
        raise ValueError(f"QuantizedCache serves full attention only; this model has {', '.join(sorted(other))}")
    return Cache(layers=[kind(nbits=bits, **options) for _ in layers])


def nested(lm, adapter, **options) -> Callable[[float], kv.NestedCache]:
    """Makes our caches of an adapter, given a budget; options as for `CacheConfig`."""
    return lambda budget: kv.NestedCache(lm, adapter, kv.CacheConfig(budget=budget, **options))
