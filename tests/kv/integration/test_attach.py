"""The seam to transformers: who is served, who is refused and why, and that plain attention is left as it was."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

from nestling import kv
from nestling.kv.integration.attach import (
    EXTRAS,
    NAME,
    attention_forward,
    cached,
    compressible_layers,
    fingerprint,
    head_shape,
    longest_text,
    output_projections,
    text_config,
)

from ..families import BASE, FAMILIES, nested_cache, tiny_fit, tiny_model

MLA = dict(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
REFUSED = {
    "deepseek_v2": (MLA, "latent attention"),
    "deepseek_v3": (MLA, "latent attention"),
    "gemma2": ({"head_dim": 16}, "soft-caps its attention logits"),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "sink logits"),
    "t5": ({}, "encoder-decoder"),
    "bart": ({}, "encoder-decoder"),
    "mamba": ({}, "no full-attention layer"),
    "mistral": ({"sliding_window": 8}, "no full-attention layer"),
    "gemma3n_text": ({}, "shares keys and values between layers"),
}
# Families beside those of `families.py`, with what their configs need to be tiny.
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
OTHERS = {
    "gpt2": {"n_inner": 96},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_bigcode": {"n_inner": 96},
    "phi": {},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "starcoder2": {},
    "glm4": {"head_dim": 16},
    "smollm3": {"head_dim": 16},
    "nemotron": {},
    "qwen3_next": {**EXPERTS, **LINEAR, "head_dim": 16, "layer_types": ["linear_attention"] + ["full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
}
MHA = ("gpt2", "gpt_neox", "opt", "gpt_bigcode")  # know nothing of KV heads


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("whisper", "max_target_positions")],
)
def test_a_model_says_how_long_a_text_it_reads(family, name):
    assert longest_text(CONFIG_MAPPING[family](**{name: 77})) == 77


def test_some_models_say_no_longest_text():
    assert longest_text(CONFIG_MAPPING["bloom"]()) is None


def other_model(kind: str, **overrides):
    base = {k: v for k, v in BASE.items() if k != "num_key_value_heads" or kind not in MHA}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**base, **overrides})).eval()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_refused_with_a_reason(kind):
    extra, reason = REFUSED[kind]
    base = {} if kind == "gemma3n_text" else BASE
    config = text_config(CONFIG_MAPPING[kind](**{**base, **extra}))
    with pytest.raises(kv.UnsupportedModelError, match=f"'{config.model_type}'.*{reason}"):
        compressible_layers(config)
    with pytest.raises(kv.UnsupportedModelError, match=reason):
        fingerprint(config)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral"])
def test_fit_refuses_before_it_touches_the_model(kind, ids):
    model = other_model(kind, **REFUSED[kind][0])
    before = model.config._attn_implementation
    with pytest.raises(kv.UnsupportedModelError, match=REFUSED[kind][1]):
        tiny_fit(model, ids, length=16)
    assert model.config._attn_implementation == before


def test_models_without_the_interface_are_refused_and_still_work(ids):
    model = other_model("bloom", n_layer=1, n_head=4)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(
            kv.UnsupportedModelError, match="BloomForCausalLM does not use transformers' attention interface"
        ):
            kv.attach(model)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", EXTRAS)
def test_attention_with_extras_is_refused_when_called(name):
    """Models that no config check knows: their extras would be dropped in silence."""
    states = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(kv.UnsupportedModelError, match=f"Linear passes {name} to its attention"):
        attention_forward(torch.nn.Linear(1, 1), *states, None, scaling=1.0, **{name: torch.zeros(2)})
    out, _ = attention_forward(torch.nn.Linear(1, 1), *states, None, scaling=1.0, **{name: None})
    assert out.shape == (1, 3, 2, 4)


def test_sliding_and_linear_layers_keep_their_stock_cache(fitted):
    made = fitted("gemma3")
    assert compressible_layers(made.model.config) == [1]
    cache = nested_cache(made.model, made.adapter, 0.7)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "DynamicSlidingWindowLayer",
        "NestedLayer",
        "DynamicSlidingWindowLayer",
    ]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_generate_the_stock_tokens_at_full_budget(kind, ids):
    model, stock = (other_model(kind, **OTHERS[kind]) for _ in range(2))
    adapter = tiny_fit(model, ids)
    mask = (torch.arange(20) >= torch.tensor([0, 7])[:, None]).long()
    options = dict(attention_mask=mask, min_new_tokens=10, max_new_tokens=10, do_sample=False)
    expected = stock.generate(ids[:2, :20] * mask, **options)
    got = model.generate(ids[:2, :20] * mask, **cached(model, nested_cache(model, adapter, 1.0)), **options)
    assert torch.equal(got, expected)
    low = model.generate(
        ids[:2, :20] * mask, **cached(model, nested_cache(model, adapter, 0.6, paper=True)), **options
    )
    assert low.shape == expected.shape and not torch.equal(low, expected)


def test_attaching_twice_switches_once(monkeypatch):
    model = tiny_model("llama-gqa")
    calls = []
    switch = type(model).set_attn_implementation
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *a: (calls.append(a), switch(*a)))
    for _ in range(2):
        kv.attach(model)
        assert model.config._attn_implementation == NAME
    assert len(calls) == 1


def test_without_its_mask_function_padding_would_be_ignored(ids):
    """The trap that `attach` avoids: transformers passes no mask to an attention function without one."""
    stock, attached, bare = (tiny_model("llama-gqa") for _ in range(3))
    AttentionInterface.register("bare", attention_forward)
    bare.set_attn_implementation("bare")
    kv.attach(attached)
    mask = (torch.arange(20) >= torch.tensor([0, 7])[:, None]).long()
    with torch.no_grad():
        expected, good, wrong = (
            model(input_ids=ids[:2, :20], attention_mask=mask).logits[mask.bool()] for model in (stock, attached, bare)
        )
    assert torch.equal(good, expected)
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_are_json_and_tell_models_apart(family):
    config = tiny_model(family).config
    ours = fingerprint(config)
    assert json.loads(json.dumps(ours)) == ours
    assert ours == fingerprint(tiny_model(family, seed=1).config)
    others = [fingerprint(tiny_model(f).config) for f in FAMILIES if f != family]
    assert ours not in others
    assert ours != fingerprint(tiny_model(family, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).config)


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_output_projections_are_the_maps_that_the_model_applies(kind):
    model = tiny_model(kind) if kind in FAMILIES else other_model(kind, **OTHERS[kind])
    config = model.config
    heads, _, width = head_shape(config)
    found = output_projections(model)
    assert sorted(set(found) & set(compressible_layers(config))) == compressible_layers(config)
    x = torch.randn(3, heads * width)
    for module in model.modules():
        for name in ("o_proj", "dense", "out_proj", "c_proj"):
            if hasattr(module, "scaling") and hasattr(module, name) and module.layer_idx in found:
                project = getattr(module, name)
                zero = project(torch.zeros_like(x))
                torch.testing.assert_close(x @ found[module.layer_idx].mT, project(x) - zero, rtol=1e-4, atol=1e-4)


def test_head_shapes_of_wide_heads():
    assert head_shape(tiny_model("qwen3").config) == (4, 2, 24)
    assert head_shape(tiny_model("llama-mha").config) == (4, 4, 16)
    assert head_shape(tiny_model("llama-mqa").config) == (4, 1, 16)
