"""Budgets as they are written: one reading of numbers and text, and errors that show what was given."""

import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.errors import BudgetError, OptionError
from nestling.kv.allocation.budget import Budget, read_budget, read_share, read_shares
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig

from ..cache.test_shrink import made
from ..families import nested_cache


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
        (50, 0.5),
        (37.5, 0.375),
        (np.int64(100), 1.0),
        ("2.5bits", 2.5 / 16),
        ("1 bit", 1 / 16),
        ("16 Bits", 1.0),
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
    *(0, -0.25, 1.01, 101, float("nan"), float("inf"), True, None, [0.5], b"25%", 1j, 10**400, torch.zeros(2)),
    *(
        "",
        "%",
        "a quarter",
        "0",
        "0%",
        "101",
        "1.5",
        "17bits",
        "0bits",
        "2bit s",
        "150%",
        "-25%",
        "0,25",
        "25%%",
        "nan",
        "inf",
        "1e999",
        "0MiB",
        "-1MiB",
    ),
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


def test_what_may_be_a_share_or_a_percentage_is_refused_with_what_to_write():
    for value in (1.25, "1.25"):
        with pytest.raises(BudgetError, match="write '1.25%'"):
            read_budget(value)
    assert read_budget("1.25%").share == 0.0125
    for value in (-50, 0, 1000):
        with pytest.raises(BudgetError) as caught:
            read_budget(value)
        assert "write" not in str(caught.value)


@given(st.floats(0.001, 1))
def test_a_share_is_read_alike_as_number_text_and_percentage(share):
    text = f"{share:.17g}"
    assert read_budget(text).share == read_budget(share).share == share
    assert read_budget(f"{share * 100:.17g}%").share == pytest.approx(share, rel=1e-15)
    assert read_budget(f"{share * 16:.17g}bits").share == pytest.approx(share, rel=1e-15)
    if share * 100 >= 2:
        assert read_budget(share * 100).share == read_budget(f"{share * 100:.17g}").share


def test_several():
    assert [b.share for b in read_shares("100%, 0.5,25")] == [1.0, 0.5, 0.25]
    assert [b.share for b in read_shares([0.5, "25%", read_budget(1)])] == [0.5, 0.25, 1.0]
    assert [b.given for b in read_shares("50%,25", "--budgets")] == ["--budgets='50%'", "--budgets='25'"]
    for wrong in ("", [], "50%,64MiB", "50%,", "50%,0.5", 0.5, None, [0.5, 200]):
        with pytest.raises(BudgetError, match="budgets"):
            read_shares(wrong)


# What messages promise


def refusal(budget, kind: dict) -> str | None:
    """The message for a budget that is too small."""
    model, adapter = made()
    try:
        NestedCache(model, adapter, CacheConfig(budget=budget, **kind))
        return None
    except BudgetError as error:
        return str(error)


def smallest_said(message: str) -> float:
    return float(re.search(r"smallest possible, ([\d.]*\d(e-\d+)?)", message)[1])


KINDS = st.fixed_dictionaries(
    {
        "quantise": st.booleans(),
        "sinks": st.integers(0, 9),
        "window": st.sampled_from([0, 1, 30, 64, 500]),
        "context": st.sampled_from([1, 20, 83, 84, 200, 1000, 4096, 10**6]),
        "dtype": st.sampled_from([None, torch.bfloat16, torch.float32]),
    }
)


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, budget=st.floats(1e-7, 0.02) | st.sampled_from([0.3, "40%", "5", "0.1bits"]))
def test_the_smallest_budget_that_is_named_works_and_what_is_advised_helps(kind, budget):
    if kind["quantise"] and kind["dtype"] == torch.float32:
        kind = {**kind, "dtype": None}
    if not (message := refusal(budget, kind)):
        return
    assert message.startswith(f"budget={budget!r} is below")
    least = smallest_said(message)
    assert refusal(least, kind) is None
    assert refusal(0.998 * least, kind) is not None
    advice = message.partition("are possible with ")[2].split(", or ") if "possible with" in message else []
    ways = {
        "fewer exact tokens": {"sinks": 0, "window": 0},
        "a longer context": {"context": 10 * kind["context"] + 10_000},
        "quantise=True": {"quantise": True},
    }
    assert set(advice) <= set(ways)
    for way, change in ways.items():  # what is advised helps, and nothing that helps is left out
        if "quantise" not in change or kind["dtype"] != torch.float32:
            found = smallest_said(refusal(1e-9, {**kind, **change}))
            assert found <= least if way in advice else found == least


def test_bits_are_not_advised_to_an_adapter_that_cannot():
    model, adapter = made()
    old = replace(adapter, quantisation_cost={}, step={})
    for made_by, said in ((adapter, True), (old, False)):
        with pytest.raises(BudgetError) as caught:
            NestedCache(model, made_by, CacheConfig(budget=0.3, quantise=False))
        assert ("quantise=True" in str(caught.value)) == said
    with pytest.raises(BudgetError) as caught:
        NestedCache(model, adapter, CacheConfig(budget=0.3, quantise=False, allocation="uniform"))
    assert "quantise=True" not in str(caught.value)


@pytest.mark.parametrize("bits", [True, False])
def test_the_smallest_limit_that_is_named_works(bits):
    model, adapter = made()
    options = dict(quantise=bits, sinks=2, window=3, context=1000)
    with pytest.raises(BudgetError, match="limit='0.0001MiB' is out of reach") as caught:
        nested_cache(model, adapter, limit="0.0001MiB", **options)
    least = float(re.search(r"takes ([\d.]+) MiB", str(caught.value))[1])
    cache = nested_cache(model, adapter, limit=f"{least}MiB", **options)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        with pytest.raises(BudgetError, match=f"limit='{least}MiB': 200 tokens take") as caught:
            model(torch.ones(1, 199, dtype=torch.long), past_key_values=cache)
        least = float(re.search(r"take ([\d.]+) MiB", str(caught.value))[1])
        cache = nested_cache(model, adapter, f"{least}MiB", **options)
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        model(torch.ones(1, 199, dtype=torch.long), past_key_values=cache)


def test_what_is_said_twice_is_refused():
    model, adapter = made()
    table = {"keys": [[8] * 6] * 2, "values": [[8] * 6] * 2}
    for options in (
        {"budget": "1MiB", "limit": "1MiB"},
        {"budget": table, "allocation": "energy"},
        {"budget": table, "limit": "1MiB"},
    ):
        with pytest.raises(BudgetError):
            nested_cache(model, adapter, **options)
    cache = nested_cache(model, adapter, 0.9, limit="1MiB")
    assert (cache.budget, cache.limit) == (0.9, 2**20)
    assert nested_cache(model, adapter, 0.9, limit=1000_000).limit == 1000_000


def test_a_quarter_is_the_default_and_all_beneath_a_limit():
    model, adapter = made()
    cache = NestedCache(model, adapter, CacheConfig(sinks=0, window=0))
    assert (cache.budget, cache.limit) == (0.25, None)
    cache = NestedCache(model, adapter, CacheConfig(limit="1MiB"))
    assert (cache.budget, cache.limit) == (1.0, 2**20)
    cache = NestedCache(model, adapter, "8bits")
    assert torch.equal(cache.allocation.stacked, NestedCache(model, adapter, 0.5).allocation.stacked)


def test_allocations_of_ranks_are_not_quantised():
    """A named one is used as it is, and quantise=False has its way; other caches are quantised where they can be."""
    model, adapter = made()
    old = replace(adapter, quantisation_cost={}, step={})
    for options, used, quantised in (
        ({}, adapter, True),
        ({"allocation": "energy"}, adapter, True),
        ({"allocation": "uniform"}, adapter, False),
        ({"quantise": False}, adapter, False),
        ({}, old, False),
    ):
        cache = NestedCache(model, used, CacheConfig(budget=0.6, **options))
        assert any(layer.quantised for layer in cache.layers) == quantised
