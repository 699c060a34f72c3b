"""Budgets as they are written: one reading of numbers and text, and errors that show what was given."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.errors import BudgetError, OptionError
from nestling.kv.budget import Budget, read_budget, read_share, read_shares


@pytest.mark.parametrize(
    "value, share",
    [
        (0.25, 0.25),
        (1, 1.0),
        (np.float32(0.5), 0.5),
        (Fraction(1, 4), 0.25),
        (torch.tensor(0.125), 0.125),
        ("0.25", 0.25),
        (".25", 0.25),
        ("1", 1.0),
        ("1.0", 1.0),
        ("25%", 0.25),
        (" 25 % ", 0.25),
        ("1%", 0.01),
        ("0.5%", 0.005),
        ("37.5", 0.375),
        ("100", 1.0),
        ("100%", 1.0),
        ("2.5e-1", 0.25),
    ],
)
def test_shares(value, share):
    assert read_budget(value).share == read_share(value).share == share and read_budget(value).limit is None


@pytest.mark.parametrize(
    "value, limit",
    [
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("512KiB", 2**19),
        ("2kB", 2000),
        ("3MB", 3_000_000),
        ("100B", 100),
    ],
)
def test_limits(value, limit):
    assert read_budget(value) == Budget(None, limit, f"budget={value!r}")
    with pytest.raises(BudgetError, match="is a limit in bytes"):
        read_share(value)


WRONG = [
    *(0, -0.25, 1.01, 50, float("nan"), float("inf"), True, None, [0.5], b"25%", 1j, 10**400, torch.zeros(2)),
    *("", "%", "a quarter", "0", "0%", "101", "150%", "-25%", "0,25", "25%%", "nan", "inf", "1e999", "0MiB", "-1MiB"),
    *("MiB", "64 MiBs", "1e300GiB", "0.1B", "١٢", "[red]25%[/]"),
]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_what_is_no_budget_is_refused_as_it_was_given(value):
    with pytest.raises(BudgetError) as caught:
        read_budget(value, "--budget")
    assert "--budget=" in str(caught.value) and isinstance(caught.value, OptionError)
    if isinstance(value, str | float):
        assert repr(value) in str(caught.value)
    assert len(str(caught.value)) < 300


def test_percents_are_suggested_to_numbers_that_may_be_meant_as_such():
    with pytest.raises(BudgetError, match="write '50%'") as caught:
        read_budget(50)
    assert "budget=50 " in str(caught.value)
    assert read_budget("50%").share == 0.5
    for value in (-50, 0, 1000):
        with pytest.raises(BudgetError) as caught:
            read_budget(value)
        assert "write" not in str(caught.value)


@given(st.floats(0.001, 1))
def test_a_share_is_read_alike_as_number_text_and_percentage(share):
    text = f"{share:.17g}"
    assert read_budget(text).share == read_budget(share).share == share
    assert read_budget(f"{share * 100:.17g}%").share == pytest.approx(share, rel=1e-15)


def test_several():
    assert [b.share for b in read_shares("100%, 0.5,25")] == [1.0, 0.5, 0.25]
    assert [b.share for b in read_shares([0.5, "25%", read_budget(1)])] == [0.5, 0.25, 1.0]
    assert [b.given for b in read_shares("50%,25", "--budgets")] == ["--budgets='50%'", "--budgets='25'"]
    for wrong in ("", [], "50%,64MiB", "50%,", "50%,0.5", 0.5, None, [0.5, 2]):
        with pytest.raises(BudgetError, match="budgets"):
            read_shares(wrong)
