"""How much a fit measures in the minutes that it is given: less text for everything, in the same proportions.

Three kinds of passes take all but the whole time: of the model as it is, of one whose cache is simulated, and of the
latter with gradients. Each is timed on a piece of the text, and what all of them take follows.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestling.errors import OptionError
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.allocation.table import block_sizes
from nestling.kv.calibration.choice import WINDOWS
from nestling.kv.calibration.config import AUTO, BASES, CONTEXT, FitConfig
from nestling.kv.calibration.correction import SHARES
from nestling.kv.calibration.costs import FEW
from nestling.kv.calibration.drift import TEXTS
from nestling.kv.calibration.search import KLMeter
from nestling.kv.calibration.sensitivity import longest, sensitivity
from nestling.kv.integration.attach import fingerprint, text_config

LEAST = 0.25  # of the text that is read by default: costs of less are those of single texts
CHOICE = 0.5  # of the minutes, that measuring two bases may take
ADAPTERS = 3  # that are compared as a whole, at two budgets
SHARES_TRIED = [1 - step / 20 for step in range(16)]  # down to `LEAST`


@dataclass(frozen=True)
class Rates:
    """Seconds per token of a pass.

    Attributes:
        plain: of the model as it is.
        simulated: with a simulated cache, and the KL to the former.
        gradient: with gradients by what is read of the cache.
    """

    plain: float
    simulated: float
    gradient: float


def paced(model, windows: Tensor, config: FitConfig) -> FitConfig:
    """The options with as much text as can be measured in ``config.minutes``; as they are where all of it can.

    Args:
        windows: token ids ``[n, T]``, to time passes on.

    Raises:
        OptionError: for fewer minutes than the least takes that costs can be told from.
    """
    return reduced(config, rates(model, windows, config), len(fingerprint(text_config(model))["layers"]))


def reduced(config: FitConfig, rates: Rates, layers: int) -> FitConfig:
    """The same, for the rates of a model with so many compressed layers."""
    assert config.minutes is not None
    most = 60 * config.minutes
    without = replace(config, basis=BASES[0]) if config.basis == AUTO else config
    chosen = choice_seconds(config, rates, layers) <= CHOICE * most
    for options in (config, without) if chosen else (without,):
        for share in SHARES_TRIED:
            if seconds(smaller := of_share(options, share), rates, layers) <= most:
                return smaller
    least = math.ceil(10 * seconds(of_share(without, LEAST), rates, layers) / 60) / 10
    raise OptionError(
        f"minutes={config.minutes:g} is too short: here the least that an adapter of this model can be measured with "
        f"takes about {least:g}. Give more, or choose a smaller model"
    )


def of_share(config: FitConfig, share: float) -> FitConfig:
    """The options with a share of the text."""

    def part(count: int, least: int) -> int:
        return max(min(count, least), round(share * count))

    return replace(
        config,
        tokens=part(config.tokens, config.length),
        pieces=part(config.pieces, FEW),
        sensitivity_windows=part(config.sensitivity_windows, FEW),
        correction_pieces=part(config.correction_pieces, 1),
    )


def seconds(config: FitConfig, rates: Rates, layers: int) -> float:
    """What a fit takes, without the time for reading text."""
    both = rates.plain + rates.gradient  # of one piece: with the model, or the steps of quantisers, first
    positions = (config.context or CONTEXT) * TEXTS  # as in `key_drift`
    return (
        (config.tokens + positions) * rates.plain
        + config.pieces * config.piece_length * both
        + config.sensitivity_windows * config.sensitivity_length * rates.gradient
        + len(SHARES) * config.correction_pieces * config.piece_length * both
        + choice_seconds(config, rates, layers)
    )


def choice_seconds(config: FitConfig, rates: Rates, layers: int) -> float:
    """What it takes to choose between bases: each side of each layer alone on two pieces, and whole adapters."""
    if config.basis != AUTO:
        return 0.0
    alone = len(BASES) * len(SIDES) * layers * 2 * config.sensitivity_length
    return (alone + 2 * ADAPTERS * WINDOWS * config.length) * rates.simulated


def rates(model, windows: Tensor, config: FitConfig) -> Rates:
    """Timed on the first tokens of the windows ``[n, T]``."""
    layers, heads, width = (fingerprint(text_config(model))[n] for n in ("layers", "num_key_value_heads", "head_dim"))
    shape = len(layers), heads, width
    eye, zeros = (dict.fromkeys(SIDES, x) for x in (torch.eye(width).expand(*shape, width), torch.zeros(shape)))
    adapter = KVAdapter(fingerprint(text_config(model)), eye, zeros, zeros)
    window = windows[:1]
    piece = windows.flatten()[None, : min(config.piece_length, longest(model, config))]
    meter = KLMeter(model, adapter, window, config.sinks, config.window)
    table = torch.full((1, 2, len(layers), heads, len(block_sizes(width))), FULL_BITS // 4)
    return Rates(
        _timed(lambda: meter.student.teacher(window.to(meter.windows.device))) / window.numel(),
        _timed(lambda: meter(table)) / window.numel(),
        _timed(lambda: sensitivity(model, adapter, [piece], config)) / piece.numel(),
    )


def _timed(run: Callable[[], Any]) -> float:
    """Seconds of the second of two runs."""
    run()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
