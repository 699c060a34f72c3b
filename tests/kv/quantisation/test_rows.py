"""Vectors at 8 bits a number: how far off they are, and that what was read is stored as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.kv.quantisation.rows import LARGEST, decode_rows, encode_rows, row_bytes


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
