"""Bytes by length: told without a model, and held by real caches, however the tokens came and went."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling import kv
from nestling.errors import OptionError
from nestling.kv.allocation.budget import SINKS
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.lengths import bytes_by_length, shared_bytes
from nestling.kv.evaluation.evaluate import held_bytes
from nestling.kv.integration.attach import fingerprint

from ..families import nested_cache, tiny_model

SMOL = dict(num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
BOUNDS = {256: 0.4, 1024: 0.26, 4096: 0.26}  # shares of the full cache at a budget of a quarter
OPTIONS = {
    "default": {"budget": 0.25},
    "half": {"budget": 0.5},
    "eighth": {"budget": 0.125},
    "ranks": {"budget": 0.5, "quantise": False},
    "fp32": {"budget": 0.5, "quantise": False, "dtype": "float32"},
    "all": {"budget": 1.0},
    "no window": {"budget": 0.25, "sinks": 0, "window": 0},
    "another context": {"budget": 0.25, "context": 500},
}


@pytest.fixture(scope="module")
def smol():
    """A model of SmolLM2's shape in one small file, and the trained adapter of SmolLM2."""
    model = tiny_model("llama-gqa", **SMOL)
    adapter = copy.copy(kv.KVAdapter.from_pretrained("smollm2"))
    adapter.fingerprint = fingerprint(model.config)
    return model, adapter


@torch.inference_mode()
def feed(cache, tokens: int, batch: int = 1) -> None:
    for index in range(len(cache.layers)):
        cache.update(*torch.randn(2, batch, 3, tokens, 64), index)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_told_is_what_is_held(smol, name):
    model, adapter = smol
    config = CacheConfig(**OPTIONS[name])
    lengths = (1, 64, 100, 256, 1000, 1024, 4096)
    rows = bytes_by_length(adapter, config, lengths)
    for tokens, row in zip(lengths, rows, strict=True):
        cache = kv.NestedCache(model, adapter, config)
        feed(cache, tokens)
        assert row == {
            "tokens": tokens, "bytes": cache.nbytes, "full_bytes": cache.full_nbytes, "share": cache.share,
        }  # fmt: skip
        assert cache.nbytes == held_bytes(cache)
        assert cache.full_nbytes == tokens * 30 * 3 * 64 * 2 * (4 if name == "fp32" else 2)
    assert shared_bytes(adapter, config) == cache.shared_nbytes


def test_the_bounds_of_a_quarter(smol):
    """Of a real cache, at every length from 1 to 600 token by token, and at some beyond."""
    model, adapter = smol
    told = {row["tokens"]: row for row in bytes_by_length(adapter, 0.25, [*range(1, 601), 1024, 2048, 4096, 8192])}
    cache = kv.NestedCache(model, adapter, 0.25)
    assert cache.shared_nbytes < 3_000_000
    for tokens in range(1, 601):
        feed(cache, 1)
        assert cache.nbytes == told[tokens]["bytes"], tokens
    assert all(row["share"] <= (1 if tokens > SINKS else 1.04) for tokens, row in told.items())
    for tokens, bound in BOUNDS.items():
        assert told[tokens]["share"] <= bound
    assert told[1024]["share"] <= 0.25 + 16 / 1024, "a budget is met at its context"


@pytest.mark.parametrize("budget", [0.125, 0.25])
def test_no_length_beyond_the_sinks_takes_more_than_the_full_cache(smol, budget):
    assert all(row["share"] <= 1 for row in bytes_by_length(smol[1], budget, range(SINKS + 1, 2000)))


VERBS = st.lists(
    st.tuples(
        st.sampled_from(["append", "token by token", "crop", "repeat", "select", "shrink"]), st.integers(1, 400)
    ),
    min_size=1,
    max_size=6,
)


@given(VERBS)
@settings(deadline=None, max_examples=15)
def test_bytes_depend_on_the_length_however_it_was_reached(smol, verbs):
    """After appends and batch verbs they are those of a cache that read the text at once; after crops no more."""
    model, adapter = smol
    cache, batch, cropped = nested_cache(model, adapter, 0.5, quantise=True), 1, False
    for verb, count in verbs:
        tokens = cache.get_seq_length()
        if verb == "append":
            feed(cache, 40 + count, batch)
        elif verb == "token by token":
            for _ in range(count // 20):
                feed(cache, 1, batch)
        elif verb == "shrink":
            cache.shrink(min(cache.budget, 0.5 - 0.3 * count / 400))
        elif tokens and verb == "crop":
            cache.crop(-min(count, tokens - 1))
            cropped = True
        elif tokens and verb == "repeat" and batch < 4:
            cache.batch_repeat_interleave(2)
            batch *= 2
        elif tokens and verb == "select":
            cache.batch_select_indices(torch.arange(1))
            batch = 1
        if tokens := cache.get_seq_length():
            (row,) = bytes_by_length(adapter, cache.budget, [tokens])
            assert cache.nbytes == held_bytes(cache)
            if cropped:  # what was encoded stays so, which takes less
                assert cache.nbytes <= (1 if tokens > SINKS else 1.04) * cache.full_nbytes
            else:
                assert cache.nbytes == batch * row["bytes"]


def test_lengths_that_do_not_tell_the_bytes_are_refused(smol):
    with pytest.raises(OptionError, match="keep_tokens=0.5"):
        bytes_by_length(smol[1], CacheConfig(budget=0.5, keep_tokens=0.5))
    with pytest.raises(OptionError, match="64MiB"):
        bytes_by_length(smol[1], "64MiB")
