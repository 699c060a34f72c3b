"""Quantisers: codes are nested in their widths, errors are those of a good scalar quantiser, packing loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.kv.quantisation.packing import pack, unpack
from nestling.kv.quantisation.quantiser import (
    WIDTHS,
    chosen_steps,
    fake_quantise,
    narrowed,
    offset,
    quantise,
    rounded,
    scale,
)

# Mean squared errors of the best uniform quantisers of a unit Gaussian (Max 1960, table II).
BEST = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 7: 0.000304, 8: 0.000087}
# How far off the nested ones may be: steps serve all widths, and cells are powers of two apart.
NEAR = dict.fromkeys((1, 2, 3, 4), 1.2) | {5: 2.0, 6: 2.2, 7: 1.9, 8: 1.7}


@given(seed=st.integers(0, 2**31), bits=st.sampled_from(WIDTHS), fewer=st.sampled_from(WIDTHS))
def test_a_narrowed_code_is_the_code_of_fewer_bits(seed, bits, fewer):
    rng = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(200, 3, generator=rng)
    step = torch.rand(3, generator=rng) + 0.01
    if fewer <= bits:
        assert torch.equal(narrowed(quantise(z, step, bits), bits, fewer), quantise(z, step, fewer))


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_fill_their_range_and_values_their_cells(bits):
    step = torch.tensor([0.3])
    z = torch.linspace(-9, 9, 4001)[:, None]
    codes = quantise(z, step, bits)
    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    assert (codes.int().diff(dim=0) >= 0).all()
    values = (codes - offset(bits)) * scale(step, bits)
    assert ((values > 0) == (z >= 0)).all() and torch.equal(values.sort(0).values, values)


def test_errors_on_gaussians_are_near_the_best_of_each_width():
    samples = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)
    steps = chosen_steps(samples)
    torch.testing.assert_close(steps / samples.std(0), torch.full((6,), 0.3), rtol=0, atol=0.04)
    for bits in WIDTHS:
        error = (rounded(samples, steps, bits) - samples).square().mean(0) / samples.square().mean(0)
        assert (error > 0.95 * BEST[bits]).all(), "better than the best: not measured right"
        assert (error < NEAR[bits] * BEST[bits]).all(), bits


def test_steps_follow_heavy_tails():
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(20000, 1, generator=rng)
    heavy = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(20000, 1, generator=rng).clamp(1e-6, 1 - 1e-6))
    one, other = chosen_steps(torch.cat((normal / normal.std(), heavy / heavy.std()), 1))
    assert other > 1.1 * one


def test_coordinates_that_never_move_are_quantised_too():
    steps = chosen_steps(torch.zeros(64, 2))
    assert (steps > 0).all()
    assert torch.isfinite((quantise(torch.zeros(3, 2), steps, 4) - offset(4)) * scale(steps, 4)).all()


def packed_by_hand(codes: torch.Tensor, widths: list[int]) -> list[list[int]]:
    """Bytes of one head's codes ``[8 n, t]``, bit by bit from the description of the format."""
    rows = []
    for field in (8, 4, 2, 1):
        for block, width in enumerate(widths):
            if width & field:
                below = sum(f for f in (1, 2, 4) if f < field and width & f)
                for row in range(field):
                    found = [0] * codes.shape[1]
                    for place in range(8 // field):
                        for token in range(codes.shape[1]):
                            code = int(codes[8 * block + row + field * place, token])
                            found[token] |= ((code >> below) % 2**field) << (place * field)
                    rows.append(found)
    return rows


@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=9).map(lambda w: sorted(w, reverse=True)),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_packing_is_what_it_says_and_comes_back(widths, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    blocks = [torch.randint(0, 1 << bits, (2, 3, 8, tokens), generator=rng) for bits in widths]
    codes = torch.cat(blocks, 2).to(torch.uint8)
    rows = pack(codes, widths)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, sum(widths), tokens)
    assert rows[1, 2].tolist() == packed_by_hand(codes[1, 2], widths)
    assert torch.equal(unpack(rows, widths), codes)


def test_training_reads_what_the_quantiser_stores_and_sees_its_size():
    """Values are those of steps of 0.3 root mean squares; gradients go straight through, and to the size."""
    z = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    bits = torch.tensor([0, 1, 2, 4, 8, 16])
    rms = z.detach().square().mean(0).sqrt().requires_grad_()
    found = fake_quantise(z, bits, rms)
    assert (found[:, 0] == 0).all() and torch.equal(found[:, 5], z[:, 5])
    for column, width in ((1, 1), (2, 2), (3, 4), (4, 8)):
        step = 0.3 * rms[column]
        value = (quantise(z[:, column].detach(), step, width).double() - offset(width)) * scale(step, width)
        torch.testing.assert_close(found[:, column], value)
    weight = torch.randn(1000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_z, by_size = torch.autograd.grad((found * weight).sum(), (z, rms))
    torch.testing.assert_close(by_z, weight * (bits > 0))
    torch.testing.assert_close(by_size, (weight * (found - z) / rms).sum(0) * (bits > 0))
    larger = fake_quantise(2 * z, bits, 2 * rms)
    torch.testing.assert_close(larger, 2 * found)
