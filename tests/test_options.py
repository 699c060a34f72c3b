"""What an option may be: property tests over the numbers, and the types that look like numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling import options
from nestling.errors import NestlingError, OptionError


@given(st.integers(), st.integers(-5, 5))
def test_a_whole_number_is_taken_exactly_when_it_is_in_range(value, minimum):
    if minimum <= value <= minimum + 10:
        assert options.whole("batch", value, minimum, minimum + 10) == value
    else:
        with pytest.raises(OptionError, match="batch"):
            options.whole("batch", value, minimum, minimum + 10)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(3), 3.0, torch.tensor(3), np.array(3)])
def test_integers_of_other_libraries_become_plain_ones(value):
    assert type(options.whole("steps", value)) is int and options.whole("steps", value) == 3


@pytest.mark.parametrize("value", [True, None, "3", b"3", 3j, 2.5, math.nan, math.inf, [3], torch.ones(2), object()])
def test_what_is_no_whole_number_is_refused_by_name_and_value(value):
    with pytest.raises(OptionError, match="steps=") as caught:
        options.whole("steps", value)
    assert isinstance(caught.value, NestlingError) and isinstance(caught.value, ValueError)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_share_is_above_0_and_at_most_1(value):
    if 0 < value <= 1:
        assert options.share("budget", value) == value
    else:
        with pytest.raises(OptionError, match="budget="):
            options.share("budget", value)


@pytest.mark.parametrize("bounds", [{"minimum": 1}, {"above": 0.5}, {"maximum": 0.25}, {"below": 0.5}])
def test_each_bound_of_a_number_is_kept(bounds):
    with pytest.raises(OptionError, match="rate=0.5"):
        options.number("rate", 0.5, **bounds)


def test_a_number_of_400_digits_is_out_of_range_and_no_overflow():
    with pytest.raises(OptionError):
        options.number("rate", 10**400)
    with pytest.raises(OptionError):
        options.whole("steps", 10**400, maximum=10**9)
    with pytest.raises(OptionError):
        options.number("rate", 10**9999)


@pytest.mark.parametrize("value", [4, 0, 1, None, "yes", np.True_])
def test_a_flag_is_a_bool(value):
    with pytest.raises(OptionError, match="bits="):
        options.flag("bits", value)
    assert options.flag("bits", True) is True


def test_a_choice_is_of_those_known_and_of_their_type():
    assert options.choice("basis", "pca", ("pca", "balanced")) == "pca"
    for value in ("PCA", 1, None, ["pca"]):
        with pytest.raises(OptionError, match="balanced"):
            options.choice("basis", value, ("pca", "balanced"))
