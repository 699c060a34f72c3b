"""The field's newest caches, simulated from their descriptions: no code of theirs is run, and no kernel.

Codes are packed, so that bytes are those that each would take, scales included. `windowed` keeps the first 4 and the
64 most recent tokens in bf16 before any of them, as nestling keeps its own.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from baselines import IntLayer, hadamard
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from nestling.kv.integration.attach import compressible_layers, stock_layers
from nestling.kv.quantisation.packing import pack, unpack

SINKS, WINDOW = 4, 64
TILE, ROUNDS = 128, 16  # of KVarN: tokens that are balanced together, and how often
CLIPS = (0.96, 0.92)  # of OSCAR: the share of the range of keys and of values that is kept
Scheme = tuple[Callable[[Tensor], Sequence[Tensor]], Callable[..., Tensor]]  # quantise, and come back


def windowed(make: Callable[[PreTrainedConfig], Cache], config: PreTrainedConfig) -> Cache:
    """The cache that ``make`` gives, behind exact first and recent tokens in the layers that it compresses."""
    layers = list(make(config).layers)
    for index in compressible_layers(config.get_text_config(decoder=True)):
        layers[index] = Windowed(layers[index])
    return Cache(layers=layers)


def fp8_cache(config: PreTrainedConfig) -> Cache:
    """Keys and values in float8 (e4m3) without scales, as vLLM keeps them."""

    def quantise(states: Tensor) -> list[Tensor]:
        return [states.float().clamp(-448, 448).to(torch.float8_e4m3fn)]

    return _cache(config, lambda index: [(quantise, Tensor.float)] * 2)


def turbo_cache(config: PreTrainedConfig, bits: int) -> Cache:
    """TurboQuant: a norm per token, a random rotation (signs and Hadamard), and the best levels for a Gaussian."""

    def quantise(states: Tensor) -> list[Tensor]:
        states = states.float()
        norm = (states.norm(dim=-1, keepdim=True) / math.sqrt(states.shape[-1])).half()
        unit = _turned(states, 1) / norm.float().clamp_min(1e-8)
        levels = gaussian_levels(bits)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        return [_pack(codes, bits), norm]

    def back(packed: Tensor, norm: Tensor) -> Tensor:
        return _turned(gaussian_levels(bits)[_unpack(packed, bits).long()] * norm.float(), -1)

    return _cache(config, lambda index: [(quantise, back)] * 2)


def oscar_cache(config: PreTrainedConfig, rotations: dict[int, tuple[Tensor, Tensor]], bits: int = 2) -> Cache:
    """OSCAR: calibrated rotations before a Hadamard, and asymmetric integers with one clipped range per token.

    Args:
        rotations: orthogonal matrices ``[Hkv, D, D]`` for the keys and values of each layer: eigenvectors of the
            second moment of the queries, and of that of the values.
    """

    def scheme(turn: Tensor, clip: float) -> Scheme:
        def quantise(states: Tensor) -> list[Tensor]:
            codes, scale, low = _asymmetric(states.float() @ turn, bits, -1, clip)
            return [_pack(codes, bits), scale, low]

        def back(packed: Tensor, scale: Tensor, low: Tensor) -> Tensor:
            return (_unpack(packed, bits) * scale.float() + low.float()) @ turn.mT

        return quantise, back

    def schemes(index: int) -> list[Scheme]:
        turns = [turn @ hadamard(turn.shape[-1], turn.device) for turn in rotations[index]]
        return [scheme(turn, clip) for turn, clip in zip(turns, CLIPS, strict=True)]

    return _cache(config, schemes)


def oscar_rotations(model, windows: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """What `oscar_cache` needs, from token ids ``[n, T]``."""
    from nestling.kv.calibration.moments import collect_moments

    moments = collect_moments(model, windows.split(4))
    return {
        index: tuple(torch.linalg.eigh(m)[1].float() for m in (moment.queries, moment.values))
        for index, moment in moments.items()
    }  # type: ignore[return-value]


def kvarn_cache(config: PreTrainedConfig, key_bits: int = 4, value_bits: int = 2) -> Cache:
    """KVarN: tiles of 128 tokens, balanced over tokens and channels; keys have a range per channel, values per token.
    What does not fill a tile is exact."""
    layers = stock_layers(config.get_text_config(decoder=True))
    for index in compressible_layers(config.get_text_config(decoder=True)):
        layers[index] = TileLayer(key_bits, value_bits)
    return Cache(layers=layers)


def _cache(config: PreTrainedConfig, schemes: Callable[[int], Sequence[Scheme]]) -> Cache:
    config = config.get_text_config(decoder=True)
    layers = stock_layers(config)
    for index in compressible_layers(config):
        layers[index] = CodedLayer(schemes(index))
    return Cache(layers=layers)


@cache
def gaussian_levels(bits: int) -> Tensor:
    """The ``2 ** bits`` levels of least squared error for a Gaussian of variance 1 (Lloyd and Max), rising."""
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    levels = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    for _ in range(2000):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add(0, nearest, density)
        levels = torch.zeros_like(levels).index_add(0, nearest, density * x) / mass
    return levels.float()


def _turned(states: Tensor, direction: int) -> Tensor:
    """By random signs and a Hadamard matrix, or back."""
    width = states.shape[-1]
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(states)
    turn = hadamard(width, states.device)
    return (states * signs) @ turn if direction > 0 else (states @ turn) * signs


def _asymmetric(states: Tensor, bits: int, dim: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and fp16 scales and minima of ``states``, ranges along ``dim``; x = code * scale + minimum."""
    low, high = states.amin(dim, keepdim=True), states.amax(dim, keepdim=True)
    low, high = low * clip, high * clip
    scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-6).half()
    low = low.half()
    codes = ((states - low.float()) / scale.float()).round().clamp(0, (1 << bits) - 1)
    return codes.to(torch.uint8), scale, low


def _pack(codes: Tensor, bits: int) -> Tensor:
    """``[..., D]`` to ``[..., bits * D / 8]``."""
    return pack(codes.mT, (bits,) * (codes.shape[-1] // 8)).mT


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return unpack(packed.mT, (bits,) * (packed.shape[-1] // bits)).mT.float()


class CodedLayer(IntLayer):
    """Keys and values in a scheme each."""

    def __init__(self, schemes: Sequence[Scheme]):
        super().__init__(8)
        self.schemes = schemes

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given = (key_states, value_states)
        new = [list(quantise(states)) for (quantise, _), states in zip(self.schemes, given, strict=True)]
        if self.parts:
            sides = zip(self.parts, new, strict=True)
            new = [[torch.cat(pair, -2) for pair in zip(old, fresh, strict=True)] for old, fresh in sides]
        self.parts = new
        keys, values = (back(*side).to(self.dtype) for (_, back), side in zip(self.schemes, new, strict=True))
        return keys, values


class TileLayer(CacheLayerMixin):
    """Whole tiles of tokens as packed integers, the others in bf16."""

    is_sliding = False

    def __init__(self, key_bits: int, value_bits: int):
        super().__init__()
        self.bits = (key_bits, value_bits)
        self.recent: list[Tensor] = []
        self.tiles: list[list[list[Tensor]]] = [[], []]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = [states.bfloat16() for states in (key_states, value_states)]
        self.recent = [torch.cat(pair, 2) for pair in zip(self.recent, new, strict=True)] if self.recent else new
        while self.recent[0].shape[2] >= TILE:
            for side, states in enumerate(self.recent):
                self.tiles[side].append(balanced(states[:, :, :TILE], self.bits[side], by_channel=side == 0))
            self.recent = [states[:, :, TILE:].clone() for states in self.recent]
        keys, values = (
            torch.cat((*(unbalanced(*tile, bits) for tile in tiles), recent.float()), 2).to(self.dtype)
            for tiles, recent, bits in zip(self.tiles, self.recent, self.bits, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return TILE * len(self.tiles[0]) + (self.recent[0].shape[2] if self.recent else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def balanced(states: Tensor, bits: int, *, by_channel: bool) -> list[Tensor]:
    """A tile ``[B, H, T, D]`` as codes, scales, minima and what the other axis was divided by."""
    x = states.float() @ hadamard(states.shape[-1], states.device)
    rows, columns = torch.ones_like(x[..., :1]), torch.ones_like(x[..., :1, :])
    for _ in range(ROUNDS):
        rows = rows * (x / (rows * columns)).std(-1, keepdim=True).clamp_min(1e-6)
        columns = columns * (x / (rows * columns)).std(-2, keepdim=True).clamp_min(1e-6)
    other = rows if by_channel else columns  # divided by its mean: what is common to all goes into the scales
    other = (other / other.log().mean((-2, -1), keepdim=True).exp()).half()
    codes, scale, low = _asymmetric(x / other.float(), bits, -2 if by_channel else -1)
    return [_pack(codes, bits), scale, low, other]


def unbalanced(packed: Tensor, scale: Tensor, low: Tensor, other: Tensor, bits: int) -> Tensor:
    x = (_unpack(packed, bits) * scale.float() + low.float()) * other.float()
    return x @ hadamard(x.shape[-1], x.device)


class Windowed(CacheLayerMixin):
    """Exact first and recent tokens in bf16 around a layer that has those between. A query sees at least `WINDOW`."""

    is_sliding = False

    def __init__(self, layer: CacheLayerMixin):
        super().__init__()
        self.layer = layer
        self.exact: list[list[Tensor]] = [[], []]  # first and recent tokens, of keys and of values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        given = [states.bfloat16() for states in (key_states, value_states)]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.exact = [[states[:, :, :SINKS].clone(), states[:, :, :0]] for states in given]
            given = [states[:, :, SINKS:] for states in given]
        old = [recent[:, :, : max(0, recent.shape[2] - WINDOW)] for _, recent in self.exact]
        coded = self.layer.update(*(states.to(self.dtype) for states in old))
        for exact, aged, states in zip(self.exact, old, given, strict=True):
            exact[1] = torch.cat((exact[1][:, :, aged.shape[2] :], states), 2)
        keys, values = (
            torch.cat((first.to(self.dtype), between, recent.to(self.dtype)), 2)
            for (first, recent), between in zip(self.exact, coded, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return sum(states.shape[2] for states in self.exact[0]) + self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1
