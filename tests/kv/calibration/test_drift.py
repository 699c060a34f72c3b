"""The drift of keys' means, as `kv.fit` measures it: against keys that are turned by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nestling import kv
from nestling.jobs.progress import progress_bar
from nestling.kv.cache import drift as spans
from nestling.kv.cache.rule import SKIP
from nestling.kv.calibration import drift as module
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.drift import key_drift

from ..families import BASE, tiny_fit, tiny_model

CONTEXT = FitConfig(context=64, length=32)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    for each in (spans, module):
        monkeypatch.setattr(each, "SPAN", 16)


def measured(model, adapter, ids, config=CONTEXT):
    with progress_bar(False) as bar:
        return key_drift(model, adapter, ids, config, bar)


@torch.no_grad()
def test_means_of_spans_are_those_of_keys_at_their_positions(fitted, ids):
    """In the first layer, whose keys do not hang on attention; in the others as the model itself says."""
    made = fitted("llama-gqa")
    model, texts = made.model, ids[:3, :32]
    found = measured(model, made.adapter, texts)
    assert found.shape == (3, 2, 4, 16)
    layer, hidden = model.model.layers[0], model.model.embed_tokens(texts[:, :16])
    keys = layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(3, 16, 2, 16).transpose(1, 2)
    means = []
    for span in range(4):
        cos, sin = model.model.rotary_emb(hidden, torch.arange(16 * span, 16 * span + 16)[None])
        turned, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        means.append(turned[:, :, SKIP:].mean((0, 2)))
    expected = torch.stack(means, 1)
    expected = expected - expected[:, :2].mean(1, keepdim=True)  # windows of 32 tokens: two spans
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_keys_that_do_not_turn_have_none(ids):
    model = SmolLM3ForCausalLM(SmolLM3Config(**BASE, no_rope_layers=[0, 0, 0])).eval()
    assert measured(model, tiny_fit(model, ids), ids[:3, :32]) is None


def test_a_context_of_one_span_has_none(fitted, ids):
    made = fitted("llama-gqa")
    assert measured(made.model, made.adapter, ids[:3, :32], FitConfig(context=31)) is None
    assert measured(made.model, made.adapter, ids[:3, :32], FitConfig(context=32)) is not None


def test_fit_measures_it_and_measuring_again_finds_the_same(ids):
    model = tiny_model("llama-gqa")
    adapter = tiny_fit(model, ids, context=64)
    assert adapter.drift is not None and adapter.drift.shape == (3, 2, 4, 16)
    config = FitConfig(length=64, pieces=4, piece_length=64, sensitivity_length=64, window=0, context=64)
    again = kv.calibration.fit.measure(model, replace(adapter, drift=None), ids, config, progress=False)
    assert torch.allclose(again.drift, adapter.drift, atol=1e-5)
