"""Who is served: the true reason is told, nothing is left behind, and what is served can be put back."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MllamaConfig, MllamaForConditionalGeneration

from nestling import kv
from nestling.kv.integration.attach import NAME, cached

from ..families import nested_cache, tiny_fit, tiny_model
from .test_attach import other_model


def weak(family: str = "llama-gqa", implementation: str = "sdpa"):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    return model


def state(model) -> dict:
    """All that a probe could leave behind."""
    return {
        "implementation": model.config._attn_implementation,
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "buffers": {name: t.clone() for name, t in model.named_buffers()},
        "random": torch.get_rng_state(),
    }


def assert_same(one: dict, other: dict) -> None:
    for name in ("implementation", "modes", "hooks", "names"):
        assert one[name] == other[name], name
    assert torch.equal(one["random"], other["random"])
    for name, (place, tensor) in one["tensors"].items():
        assert place == other["tensors"][name][0] and torch.equal(tensor, other["tensors"][name][1])
    assert all(torch.equal(tensor, other["buffers"][name]) for name, tensor in one["buffers"].items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "moe"])
def test_a_look_leaves_nothing_behind(family, implementation, training):
    model = weak(family, implementation).train(training)
    model.get_decoder().layers[1].eval()  # modes may be mixed
    before = state(model)
    assert kv.supports(model) is None
    assert_same(before, state(model))


def test_long_rope_tables_are_left_alone():
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    rope["original_max_position_embeddings"] = 16
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 43)[None])  # past the original length: the long table is in use
    before = state(model)
    assert kv.supports(model) is None
    assert_same(before, state(model))


def test_a_model_is_looked_at_once_and_again_when_its_config_changes(monkeypatch):
    model, calls = tiny_model("llama-gqa"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert kv.supports(model) is None and calls
    calls.clear()
    for _ in range(3):
        assert kv.supports(model) is None
        kv.attach(model)
    assert not calls
    model.config.attn_logit_softcapping = 30.0
    assert "soft-caps" in kv.supports(model)


# Reasons


class Peeks(nn.Module):
    """An attention module that does something with keys and values behind its cache."""

    def __init__(self, stock, change):
        super().__init__()
        self.stock, self.change = stock, change
        self.layer_idx = stock.layer_idx

    def forward(self, hidden_states, **kwargs):
        return self.change(self.stock, hidden_states, kwargs)


def without_cache(stock, hidden, kwargs):
    return stock(hidden, **{k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache")})


def bidirectional(stock, hidden, kwargs):
    stock.is_causal = False
    return stock(hidden, **kwargs)


def twice(stock, hidden, kwargs):
    stock(hidden, **kwargs)
    return stock(hidden, **kwargs)


def extra(stock, hidden, kwargs):
    return stock(hidden, key_bias=torch.ones(1), **kwargs)


def by_another_number(stock, hidden, kwargs):
    stock.layer_idx, kept = 0, stock.layer_idx
    try:
        return stock(hidden, **kwargs)
    finally:
        stock.layer_idx = kept


CHANGES = {without_cache: "once", bidirectional: "tokens so far", twice: "", extra: "key_bias", by_another_number: ""}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_does_is_seen(change, ids):
    model = tiny_model("llama-gqa")
    model.model.layers[2].self_attn = Peeks(model.model.layers[2].self_attn, change)
    before = model.config._attn_implementation
    reason = kv.supports(model)
    assert reason and CHANGES[change] in reason
    with pytest.raises(kv.UnsupportedModelError) as error:
        kv.attach(model)
    assert str(error.value) == reason
    with pytest.raises(kv.UnsupportedModelError):
        tiny_fit(model, ids)
    assert model.config._attn_implementation == before


def test_layers_that_text_never_reaches_are_named():
    text = dict(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, cross_attention_layers=[1, 3], max_position_embeddings=512, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=28, patch_size=14, max_num_tiles=1, vision_output_dim=64, supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
    )  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=110))
    assert "layers 1, 3" in kv.supports(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).model,
    ],  # fmt: skip
)
def test_what_is_no_language_model_is_said_to_be_none(model):
    assert type(model).__name__ in kv.supports(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = tiny_model("llama-gqa")
    assert "meta" in kv.supports(model)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_prefixes_of_peft_are_refused_and_lora_is_served(kind, ids):
    peft = pytest.importorskip("peft")
    options = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
    classes = {"PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig}
    model = peft.get_peft_model(tiny_model("llama-gqa"), classes.get(kind, peft.PromptEncoderConfig)(**options))
    assert kind in kv.supports(model)
    adapter = tiny_fit(model.get_base_model(), ids)  # the prefix is not part of it
    with pytest.raises(kv.UnsupportedModelError, match=kind):
        nested_cache(model, adapter, 0.75)
    lora = peft.get_peft_model(tiny_model("llama-gqa"), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert kv.supports(lora) is None
    assert nested_cache(lora, adapter, 0.75) is not None


# Back


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_detach_puts_back_what_was(family, implementation, ids):
    model, stock = weak(family, implementation), weak(family, implementation)
    for _ in range(2):
        kv.attach(model)
    assert model.config._attn_implementation == NAME
    for _ in range(2):
        kv.detach(model)
        assert model.config._attn_implementation == implementation
    with torch.no_grad():
        got, expected = (m(input_ids=ids[:2], output_attentions=True) for m in (model, stock))
    assert torch.equal(got.logits, expected.logits) and len(got.attentions) == len(expected.attentions)


def test_everything_that_measures_leaves_the_model_as_it_was(tmp_path, ids):
    model = weak(implementation="eager").train()
    adapter = tiny_fit(model, ids)
    searched = kv.SearchConfig(windows=1, length=64, window=0)
    measured = kv.EvalConfig(budgets=[0.75], windows=1, length=64, window=0)
    trained = kv.TrainConfig(
        output_dir=tmp_path, tokens=64, length=32, batch_size=1, progress=False, budgets=[0.75], window=0, sinks=0
    )
    for run in (
        lambda: kv.search(model, None, ids, adapter, searched, progress=False),
        lambda: kv.evaluate(model, None, ids, adapter, measured, progress=False),
        lambda: kv.train(model, None, ids, adapter, trained),
        lambda: pytest.raises(kv.CalibrationError, tiny_fit, _broken(model), ids),
    ):
        run()
        assert model.config._attn_implementation == "eager" and all(m.training for m in model.modules())
    kv.attach(model)
    kv.search(model, None, ids, adapter, searched, progress=False)
    assert model.config._attn_implementation == NAME


def _broken(model):
    model.model.layers[1].self_attn.v_proj.weight.data.fill_(float("nan"))
    return model


def test_attention_weights_are_there_with_plain_caches_and_missed_with_nested_ones(ids):
    model, stock = weak(), weak(implementation="eager")
    adapter = tiny_fit(model, ids)
    cache = nested_cache(model, adapter, 0.75)
    mask = (torch.arange(64) >= torch.tensor([0, 7])[:, None]).long()
    inputs = dict(input_ids=ids[:2] * mask, attention_mask=mask, output_attentions=True)
    with torch.no_grad():
        got, expected = (m(**inputs).attentions for m in (model, stock))
        assert len(got) == len(expected) == 3
        for ours, theirs in zip(got, expected, strict=True):
            rows = mask.bool()[:, None, :, None].expand_as(theirs)
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=1e-5)
        held, step = DynamicCache(config=model.config), DynamicCache(config=stock.config)
        for part in ids[:1, :12].split((9, 2, 1), 1):
            ours, theirs = (
                m(input_ids=part, output_attentions=True, **cached(m, c)).attentions[0]
                for m, c in ((model, held), (stock, step))
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(**inputs, **cached(model, cache))
        assert any("attention weights" in str(w.message) for w in seen)


def test_continuous_batching_takes_a_model_back(ids):
    model = tiny_model("llama-gqa")
    kv.attach(model)
    kv.detach(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_attached_model_remember_what_it_was(carry, ids):
    model = weak(implementation="eager")
    kv.attach(model)
    other = carry(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids[:1]).logits, model(input_ids=ids[:1]).logits)
    kv.detach(other)
    assert other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == NAME


@pytest.mark.slow
def test_a_pickled_attached_model_runs_in_another_process(tmp_path):
    model = tiny_model("llama-gqa")
    kv.attach(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "model(input_ids=torch.arange(3, 20)[None])\n"
        "from nestling import kv\n"
        "kv.detach(model)\n"
        "print(model.config._attn_implementation)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "sdpa", done.stderr


def test_the_keyword_of_the_cache_is_the_one_that_forward_has():
    class Old(nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    class New(nn.Module):
        def forward(self, input_ids, cache=None): ...

    assert list(cached(Old(), "c")) == ["past_key_values"] and list(cached(New(), "c")) == ["cache"]


@pytest.mark.parametrize("start, when", [(10, "update"), (16, "update"), (20, "creation")])
def test_long_rope_warns_of_what_generate_does_to_the_cache(start, when, ids):
    """It is dropped when the text passes the original length, and at once by a prompt that is longer."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    rope["original_max_position_embeddings"] = 16
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    adapter = tiny_fit(model, ids)
    with pytest.warns(UserWarning, match="16 tokens"):
        cache = nested_cache(model, adapter, 0.75)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        arguments = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
        out = model.generate(ids[:1, :start], **cached(model, cache), **arguments, return_dict_in_generate=True)
    kept = out.get("cache", out.get("past_key_values")) is cache
    assert not kept
    assert any("16 tokens" in str(w.message) for w in seen) == (when == "update")


MAMBA = dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16)
COMPUTING = {
    "diffllama": ({}, "computes with"),
    "doge": ({}, "computes with"),
    "falcon_h1": (MAMBA, "recurrent state"),
}


@pytest.mark.parametrize("kind", COMPUTING)
def test_families_that_do_more_with_their_cache_are_refused_with_the_reason(kind):
    extra, reason = COMPUTING[kind]
    assert reason in kv.supports(other_model(kind, **extra))
