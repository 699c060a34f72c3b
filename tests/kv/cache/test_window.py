"""How many recent tokens are exact: by budget and by length, and never fewer at a larger one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling import kv
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.factory import CacheFactory, planned
from nestling.kv.cache.rule import capacity
from nestling.kv.cache.window import EXACT_SHARE, LARGEST, LEAST, Window

BUDGETS = st.floats(0.02, 1.0)


@pytest.fixture(scope="module")
def adapter():
    return kv.KVAdapter.from_pretrained("smollm2")


@given(BUDGETS, st.integers(1, 10_000), st.integers(0, 8), st.booleans())
@settings(deadline=None)
def test_it_grows_with_the_text_beyond_the_context_and_by_one_token_at_most(budget, context, sinks, rows):
    window = Window.of_budget(budget, context, sinks, rows)
    lengths = range(1, 3 * context, max(context // 50, 1))
    assert window.at(torch.tensor([*lengths])).tolist() == [window.at(n) for n in lengths]
    assert all(window.at(n) == window.least for n in lengths if n <= context)
    assert all(0 <= window.at(n + 1) - window.at(n) <= 1 for n in lengths)
    assert window.least >= LEAST


def test_a_number_is_a_number_at_every_length():
    window = Window(40)
    assert {window.at(n) for n in (1, 100, 10_000)} == {40}
    assert window.at(torch.arange(5)).tolist() == [40] * 5
    assert not Window() and Window(1) and Window(0, 0.1)


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("budget, context", [(0.25, 1024), (0.25, 8192), (0.125, 4096), (0.0625, 8192), (0.5, 2048)])
def test_exact_tokens_take_three_tenths_of_a_budget(adapter, budget, context, quantise):
    if not quantise and budget < 0.25:
        return  # ranks need more than seven tenths of that
    config = CacheConfig(budget=budget, context=context, quantise=quantise)
    plan = planned(adapter, config)
    size = capacity(config.sinks, plan.window, context)
    # A vector of 64 numbers has 66 bytes and not 128.
    taken = (size + config.sinks * plan.rows) * (33 / 64 if plan.rows else 1)
    assert taken / context == pytest.approx(EXACT_SHARE * min(budget, LARGEST), rel=0.05, abs=2 / context)


@given(st.lists(BUDGETS, min_size=2, max_size=8), st.booleans(), st.sampled_from([200, 1024, 5000]))
@settings(deadline=None)
def test_a_smaller_budget_keeps_no_more_of_anything(budgets, quantise, context):
    """Which is what lets a cache in use be shrunk."""
    adapter = kv.KVAdapter.from_pretrained("smollm2")
    factory = CacheFactory(adapter, CacheConfig(quantise=quantise, context=context))
    shares = sorted({b * near for b in budgets for near in (1, 0.9999, 0.99)})
    shares = [share for share in shares if share >= factory.smallest]
    tables = [factory.at(share) for share in shares]
    for less, more in zip(tables, tables[1:], strict=False):
        assert (less.stacked <= more.stacked).all()
    windows = [factory.window(share) for share in shares]
    for less, more in zip(windows, windows[1:], strict=False):
        assert all(less.at(n) <= more.at(n) for n in (1, 100, 1000, 3000, 20_000))
