"""Vectors at 8 bits a number: how far off they are, and that what was read is stored as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.kv.quantisation.rows import LARGEST, LEAST, Units, decode_rows, encode_rows, row_bytes


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 7, 16, 64, 96]), st.floats(-30, 30))
def test_no_number_is_off_by_more_than_half_a_code(seed, width, magnitude):
    rng = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, 3, width, generator=rng) * 10.0**magnitude
    rows = encode_rows(vectors)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, row_bytes(width))
    largest = vectors.abs().amax(-1, keepdim=True)
    # Half a code; and a scale is rounded to eight bits, by which the largest number may be cut off.
    assert ((decode_rows(rows) - vectors).abs() <= largest * (0.5 / LARGEST + 2**-8)).all()


@given(st.integers(0, 2**31), st.sampled_from([7, 64]))
def test_what_was_read_is_stored_as_it_is(seed, width):
    read = decode_rows(encode_rows(torch.randn(5, width, generator=torch.Generator().manual_seed(seed))))
    assert torch.equal(decode_rows(encode_rows(read)), read)


@pytest.mark.parametrize("width", [7, 64])
def test_places_in_a_larger_store_are_read_alike(width):
    rows = encode_rows(torch.randn(2, 3, 9, width, generator=torch.Generator().manual_seed(0)))
    part = rows[:, :, 2:5]
    assert torch.equal(decode_rows(part), decode_rows(part.contiguous()))


def test_zeros_and_nothing():
    assert torch.equal(decode_rows(encode_rows(torch.zeros(2, 8))), torch.zeros(2, 8))
    assert decode_rows(encode_rows(torch.zeros(2, 0, 8))).shape == (2, 0, 8)


def units_of(spread: torch.Tensor) -> Units:
    """For one head whose keys and values vary by ``spread`` ``[D]``."""
    return Units.of(torch.zeros(1, len(spread)), [spread.square()[None]] * 2)


def test_units_keep_small_numbers_beside_large_ones():
    """As in keys of Gemma 3: what is lost, in proportion to what each number varies by."""
    spread = torch.cat((torch.full((4,), 100.0), torch.ones(60)))
    states = torch.randn(1, 1, 500, 64, generator=torch.Generator().manual_seed(0)) * spread
    units = units_of(spread)
    for read, unit in zip(units.decode(*units.encode(states, states)), (units.key, units.value), strict=True):
        lost, plain = ((x - states).square().mean((0, 1, 2)).sqrt() for x in (read, decode_rows(encode_rows(states))))
        assert unit[0, 0, 0, 0] / unit[0, 0, 0, -1] == pytest.approx(10, rel=1e-3)
        assert (lost / spread)[4:].max() < (plain / spread)[4:].max() / 5
        assert lost[:4].max() < 1.1 * plain[:4].max()


@given(st.integers(0, 2**31), st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8]), min_size=8, max_size=8))
def test_units_are_positive_and_what_never_varied_is_read_too(seed, spread):
    units = units_of(torch.tensor(spread))
    assert (units.key > 0).all() and units.key.min() >= LEAST * 0.99
    states = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(seed))
    for read, unit in zip(units.decode(*units.encode(states, states)), (units.key, units.value), strict=True):
        largest = (states / unit).abs().amax(-1, keepdim=True)
        assert ((read - states).abs() <= largest * unit * (0.5 / LARGEST + 2**-8)).all()
