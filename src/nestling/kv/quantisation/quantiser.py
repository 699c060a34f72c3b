"""Scalar quantisers of 1 to 8 bits whose codes are nested: dropping bits of a code gives the code of a smaller width.

A coordinate z, taken about its mean, has one step: that of 4 bits. Cells at other widths are the step times a power
of two, so every boundary of a coarse quantiser is one of each finer one. Codes at the ends reach to infinity.
"""

import math

import torch
from torch import Tensor

WIDTHS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
)  # bits of a code; a coordinate that is not coded has 0 bits, or 16 and is stored as it is
# A cell, in steps. From 6 bits on codes reach twice as far: what is cut off at the ends would be most of the error.
CELLS = {1: 8.0, 2: 4.0, 3: 2.0, 4: 1.0, 5: 0.5, 6: 0.5, 7: 0.25, 8: 0.125}
# Where a cell's values lie in the mean, from its middle towards zero: outer cells are wide, and densities fall.
SHRINK = {1: 0.65, 2: 0.93, 3: 1.0, 4: 1.02, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}
USUAL = 0.3  # what `chosen_steps` finds for Gaussians, about
TRIED = (0.22, 0.24, 0.26, 0.28, 0.30, 0.32, 0.34, 0.36, 0.39, 0.42, 0.46, 0.50)  # steps, in root mean squares


def quantise(z: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes of z, uint8 in 0 .. 2^bits - 1; ``step`` is broadcast, and positive."""
    half = 1 << (bits - 1)
    return (z / (step * CELLS[bits])).floor_().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def offset(bits: int) -> float:
    """What codes are counted from: the value of a code is ``(code - offset) * scale``."""
    return (1 << (bits - 1)) - 0.5


def scale(step: Tensor, bits: int) -> Tensor:
    """The value of one code more."""
    return step * (CELLS[bits] * SHRINK[bits])


def rounded(z: Tensor, step: Tensor, bits: int) -> Tensor:
    """What is read of coordinates about their means that are stored with so many bits."""
    return (quantise(z, step, bits) - offset(bits)) * scale(step, bits)


def fake_quantise(z: Tensor, bits: Tensor, rms: Tensor) -> Tensor:
    """What is read of coordinates that are stored with some bits each, with a gradient: for training.

    Errors are those of steps in proportion to the root mean square, and they pass the gradient of that on: it pays to
    have less to quantise. The rest is a straight-through estimate.

    Args:
        z: coordinates about their means.
        bits: 0, one of `WIDTHS`, or 16 for none lost; broadcast to ``z``.
        rms: root mean squares, broadcast to ``z``.
    """
    still, size = z.detach(), rms.detach().clamp_min(torch.finfo(z.dtype).tiny)
    step, error = USUAL * size, torch.zeros_like(z)
    for width in WIDTHS:
        value = rounded(still, step, width)
        error = torch.where(bits == width, value - still, error)
    return torch.where(bits == 0, 0.0, z + error / size * rms)


def narrowed(code: Tensor, bits: int, fewer: int) -> Tensor:
    """The code that the same value has at ``fewer`` bits."""
    if bits == fewer:
        return code
    shift = round(math.log2(CELLS[fewer] / CELLS[bits]))
    middle, half = 1 << (bits - 1), 1 << (fewer - 1)
    if middle == half << shift:  # both have the same range
        return code >> shift
    return ((code.int() - middle) >> shift).clamp_(-half, half - 1).add_(half).to(torch.uint8)


def chosen_steps(samples: Tensor) -> Tensor:
    """Steps that serve all widths, ``[..., D]``.

    Those of `TRIED` with the smallest geometric mean of the mean squares that are lost at 2, 3 and 4 bits.

    Args:
        samples: coordinates about their means, ``[..., N, D]``.
    """
    power = samples.square().mean(-2).clamp_min(torch.finfo(samples.dtype).tiny)
    best, steps = torch.full_like(power, torch.inf), torch.ones_like(power)
    for share in TRIED:
        step = share * power.sqrt()
        lost = [(rounded(samples, step[..., None, :], bits) - samples).square().mean(-2) for bits in (2, 3, 4)]
        criterion = (torch.stack(lost) / power).clamp_min(1e-12).log().sum(0)
        better = criterion < best
        best, steps = torch.where(better, criterion, best), torch.where(better, step, steps)
    return steps
