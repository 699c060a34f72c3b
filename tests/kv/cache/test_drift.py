"""The drift of keys' means: where coordinates are not stored, they are read at the mean of their span of positions."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling import kv
from nestling.errors import AdapterError
from nestling.kv.cache import drift as module
from nestling.kv.cache.drift import Means, add_by_span, span_of

from ..families import nested_cache

SPANS = 4


@pytest.fixture
def short_spans(monkeypatch):
    monkeypatch.setattr(module, "SPAN", 8)


def drifting(adapter, seed: int = 0, size: float = 1.0):
    layers, heads, width = adapter.shape
    generator = torch.Generator().manual_seed(seed)
    return replace(adapter, drift=size * torch.randn(layers, heads, SPANS, width, generator=generator))


@given(tokens=st.integers(0, 70), spans=st.integers(1, 6), span=st.integers(1, 20))
def test_every_token_gets_what_its_span_has(tokens, spans, span):
    before, module.SPAN = module.SPAN, span
    try:
        drift, logits = torch.randn(3, 2, spans), torch.randn(3, 2, tokens)
        expected = logits.clone()
        for token in range(tokens):
            expected[..., token] += drift[..., min(token // span, spans - 1)]
        assert span_of(torch.arange(tokens), spans).tolist() == [min(t // span, spans - 1) for t in range(tokens)]
        add_by_span(logits, drift)
        torch.testing.assert_close(logits, expected)
    finally:
        module.SPAN = before


def test_means_of_values_stay_and_those_of_keys_drift():
    mean, drift = torch.randn(2, 3, 2, 16), torch.randn(3, 2, SPANS, 16)
    positions = torch.tensor([0, 255, 256, 5000])
    keys, spans = Means(mean, drift).by_span(0, 1, positions)
    assert spans.tolist() == [0, 0, 1, 3] and torch.equal(keys, mean[0, 1][:, None] + drift[1])
    values, spans = Means(mean, drift).by_span(1, 1, positions)
    assert spans.tolist() == [0, 0, 0, 0] and torch.equal(values, mean[1, 1][:, None])
    assert torch.equal(Means(mean, None).by_span(0, 1, positions)[0], mean[0, 1][:, None])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_keys_are_read_at_the_means_of_their_spans(fitted, ids, family, short_spans):
    """By the closed form M + (k - M) P, with P what ranks keep and M the mean of a span."""
    made = fitted(family)
    adapter = drifting(made.adapter)
    config = kv.CacheConfig.paper(0.5, dtype=torch.float32)
    caches = [kv.NestedCache(made.model, a, config) for a in (adapter, replace(adapter, drift=None))]
    full = kv.NestedCache(made.model, adapter, kv.CacheConfig.paper(1.0, dtype=torch.float32))
    for layer in (layer for cache in (*caches, full) for layer in cache.layers):
        layer.update(*keys_of(made.model, 40))
    table, tokens = caches[0].allocation, torch.arange(40).div(8, rounding_mode="floor").clamp(max=SPANS - 1)
    moved = False
    for row, head in itertools.product(range(adapter.shape[0]), range(adapter.shape[1])):
        got, constant, keys = (c.layers[row].expand(torch.float32)[0][0, head] for c in (*caches, full))
        keep = torch.repeat_interleave(table.stacked[0, row, head] > 0, 8)[: adapter.shape[2]].float()
        projector = (adapter.encode["key"][row, head] * keep) @ adapter.decode["key"][row, head]
        mean = adapter.mean["key"][row, head] + adapter.drift[row, head][tokens]
        torch.testing.assert_close(got, mean + (keys - mean) @ projector, rtol=1e-4, atol=1e-4)
        if keep.all():
            torch.testing.assert_close(got, constant)
        moved |= not torch.allclose(got, constant)
    assert moved


def keys_of(model, tokens: int):
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 1, config.num_key_value_heads, tokens, width, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("budget", [{"quantise": True, "budget": 0.3}, {"budget": 0.6}])
def test_attention_in_coordinates_is_that_at_full_width(fitted, ids, budget, short_spans):
    made = fitted("llama-gqa")
    adapter = drifting(made.adapter)

    def read(cut: int) -> torch.Tensor:
        cache = nested_cache(made.model, adapter, sinks=2, window=4, exact_prompt=False, **budget)
        return torch.cat([made.model(p, past_key_values=cache).logits for p in ids[:2, :50].split(cut, 1)], 1)

    at_full_width, in_coordinates = read(50), read(1)
    torch.testing.assert_close(in_coordinates, at_full_width, rtol=2e-3, atol=2e-3)
    still = replace(adapter, drift=None)
    cache = nested_cache(made.model, still, sinks=2, window=4, exact_prompt=False, **budget)
    assert not torch.allclose(made.model(ids[:2, :50], past_key_values=cache).logits, at_full_width, atol=1e-2)


@torch.no_grad()
def test_a_full_cache_has_no_drift(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, drifting(made.adapter, size=100.0), 1.0, exact_prompt=False)
    assert all(layer.drift is None for layer in cache.layers)
    expected = made.model(ids[:1, :40]).logits
    torch.testing.assert_close(made.model(ids[:1, :40], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_smaller_caches_copies_and_files_have_that_of_their_bases(fitted, ids, tmp_path, short_spans):
    made = fitted("llama-gqa")
    adapter = drifting(made.adapter)
    options = {"sinks": 2, "window": 4, "exact_prompt": False, "quantise": True}
    cache, shrunk, small = (nested_cache(made.model, adapter, budget, **options) for budget in (0.6, 0.6, 0.4))
    for each in (cache, shrunk, small):
        made.model(ids[:1, :40], past_key_values=each)
    cache.save(tmp_path / "cache.safetensors")
    copies = {
        "copy": copy.deepcopy(cache),
        "pickle": pickle.loads(pickle.dumps(cache)),
        "file": kv.NestedCache.load(tmp_path / "cache.safetensors", made.model, adapter),
    }
    expected = made.model(ids[:1, 40:41], past_key_values=cache).logits
    for name, each in copies.items():
        assert torch.equal(made.model(ids[:1, 40:41], past_key_values=each).logits, expected), name
    shrunk.shrink(0.4)
    for ours, theirs in zip(shrunk.layers, small.layers, strict=True):
        assert (ours.drift is None and theirs.drift is None) or torch.equal(ours.drift, theirs.drift)
    assert any(layer.drift is not None for layer in small.layers)


@torch.no_grad()
def test_tokens_that_were_evicted_leave_no_row_to_drift_along(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, drifting(made.adapter), 0.6, keep_tokens=0.5, sinks=2, window=4)
    assert all(layer.drift is None for layer in cache.layers)


def test_an_adapter_keeps_it(fitted, tmp_path):
    adapter = drifting(fitted("gemma3").adapter)
    adapter.save_pretrained(tmp_path / "whole")
    assert torch.equal(kv.KVAdapter.from_pretrained(tmp_path / "whole").drift, adapter.drift)
    adapter.save_pretrained(tmp_path / "half", half=True)
    half = kv.KVAdapter.from_pretrained(tmp_path / "half")
    torch.testing.assert_close(half.drift, adapter.drift, rtol=1e-3, atol=1e-3)
    replace(adapter, drift=None).save_pretrained(tmp_path / "none")
    assert kv.KVAdapter.from_pretrained(tmp_path / "none").drift is None


@pytest.mark.parametrize("change", ["spans", "nan", "shape"])
def test_what_is_no_drift_is_refused(fitted, change):
    adapter = drifting(fitted("llama-gqa").adapter)
    wrong = {
        "spans": adapter.drift[:, :, :0],
        "nan": adapter.drift.clone().index_fill_(2, torch.tensor([1]), float("nan")),
        "shape": adapter.drift[:, :, 0],
    }[change]
    with pytest.raises(AdapterError, match="drift"):
        replace(adapter, drift=wrong)
