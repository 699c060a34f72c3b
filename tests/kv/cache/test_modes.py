"""Grad modes and autocast: a cache that was filled in one of them goes on in any other, with the same numbers."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import DynamicCache

from nestling import kv
from nestling.errors import GradientError

from ..families import nested_cache, tiny_fit, tiny_model

MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
CACHES = {
    "full": dict(budget=1.0),
    "ranks": dict(budget=0.6, sinks=2, window=6),
    "no window": dict(budget=0.6, sinks=0, window=0),
    "bits": dict(budget=0.4, quantise=True, sinks=2, window=6),
    "evicting": dict(budget=0.8, keep_tokens=0.8, sinks=2, window=6),
}


@contextmanager
def autocast(dtype=torch.bfloat16):
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        yield


def new_cache(made, name: str, **options):
    return nested_cache(made.model, made.adapter, **{"context": 256, **CACHES[name], **options})


def feed(model, cache, ids, lengths, modes) -> torch.Tensor:
    """Logits of pieces of a text, each read in a mode of its own."""
    logits, start = [], 0
    for length, mode in zip(lengths, modes, strict=True):
        with mode():
            out = model(input_ids=ids[:, start : start + length], past_key_values=cache)
            logits.append(out.logits.detach().clone().float())
        start += length
    return torch.cat(logits, 1)


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_goes_on_in_another_mode(fitted, ids, name, first, second):
    """Also back again, over the growth of storage and over borders of the window."""
    made, lengths = fitted("llama-gqa"), [30, 1, 5, 1, 18, 1, 1]
    orders = [(first, second)[i % 2] for i in range(len(lengths))]
    assert all(p.requires_grad for p in made.model.parameters())
    expected = feed(made.model, new_cache(made, name), ids[:2], lengths, [torch.no_grad] * len(lengths))
    got = feed(made.model, new_cache(made, name), ids[:2], lengths, [MODES[mode] for mode in orders])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("made_in", MODES)
@pytest.mark.parametrize("verb", ["reorder", "repeat", "select", "crop", "shrink", "copy", "reset"])
@pytest.mark.parametrize("name", ["full", "ranks", "bits"])
def test_verbs_in_a_mode_leave_a_cache_for_all(fitted, ids, name, verb, made_in):
    made, outs = fitted("llama-gqa"), []
    verbs = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "crop": lambda cache: cache.crop(-3),
        "shrink": lambda cache: cache.shrink({"full": 0.8, "ranks": 0.58, "bits": 0.38}[name]),
        "reset": lambda cache: cache.reset(),
        "copy": copy.deepcopy,
    }
    for mode in (MODES[made_in], torch.no_grad):
        with mode():
            cache = new_cache(made, name)
            made.model(input_ids=ids[:2, :30], past_key_values=cache)
            cache = verbs[verb](cache) or cache
        batch = cache.layers[0].batch or 2
        outs.append(feed(made.model, cache, ids[2 : 2 + batch], [1, 20, 1], [torch.enable_grad] * 3))
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["into", "out of", "in and out"])
@pytest.mark.parametrize("name", CACHES)
def test_autocast_may_come_and_go(fitted, ids, name, order, dtype):
    """As near to the stock cache in the same modes as 16 bits are, where nothing is lost; no error where it is."""
    made, lengths = fitted("qwen3"), [30, 1, 5, 1, 18, 1, 1]
    modes = {
        "into": [torch.no_grad] * 3 + [lambda: autocast(dtype)] * 4,
        "out of": [lambda: autocast(dtype)] * 3 + [torch.no_grad] * 4,
        "in and out": [lambda: autocast(dtype), torch.inference_mode, torch.no_grad] * 2 + [lambda: autocast(dtype)],
    }[order]
    got = feed(made.model, new_cache(made, name), ids[:2], lengths, modes)
    if name == "full":
        expected = feed(made.stock, DynamicCache(config=made.stock.config), ids[:2], lengths, modes)
    else:
        expected = feed(made.model, new_cache(made, name), ids[:2], lengths, [torch.no_grad] * len(lengths))
    spread = float(expected.std())
    assert float((got - expected).abs().mean()) < (0.002 if name == "full" else 0.1) * spread


def test_what_comes_in_full_precision_after_autocast_is_stored_in_it(fitted, ids):
    made = fitted("qwen3")
    cache, stock = nested_cache(made.model, made.adapter, 1.0), DynamicCache(config=made.stock.config)
    with autocast():
        for model, held in ((made.model, cache), (made.stock, stock)):
            model.model.layers[0].self_attn.k_norm, norm = torch.nn.Identity(), model.model.layers[0].self_attn.k_norm
            model(input_ids=ids[:1, :8], past_key_values=held)
            model.model.layers[0].self_attn.k_norm = norm
    for model, held in ((made.model, cache), (made.stock, stock)):
        with torch.no_grad():
            model(input_ids=ids[:1, 8:12], past_key_values=held)
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        assert ours.keys.dtype == torch.float32
        torch.testing.assert_close(ours.keys, theirs.keys.float(), rtol=1e-2, atol=1e-2)


def test_a_model_may_change_its_precision(ids):
    model = tiny_model("llama-gqa")
    adapter = tiny_fit(model, ids)
    for budget in (1.0, 0.6):
        cache = nested_cache(model, adapter, budget, sinks=2, window=6, context=256)
        with torch.no_grad():
            before = model(input_ids=ids[:1, :30], past_key_values=cache).logits[:, -1]
            model.bfloat16()
            after = model(input_ids=ids[:1, 30:32], past_key_values=cache).logits
        model.float()
        assert torch.isfinite(after).all() and before.dtype == torch.float32


# Calibration, search, measurement and training


def adapters_equal(one, other) -> bool:
    return all(
        torch.equal(getattr(one, name)[side], getattr(other, name)[side])
        for name in ("encode", "mean", "drop_cost", "quantisation_cost", "step")
        for side in ("key", "value")
    )


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast"])
def test_calibration_search_and_evaluation_are_the_same_in_every_mode(ids, mode):
    context = {**MODES, "autocast": autocast}[mode]
    model, found = tiny_model("llama-gqa"), []
    for within in (nullcontext, context):
        with within():
            text = ids.clone()
            exact = dict(length=64, sinks=2, window=6)
            adapter = tiny_fit(model, text, **exact)
            searched = kv.search(model, None, text, adapter, kv.SearchConfig(**exact), progress=False)
            rows = kv.evaluate(model, None, text, adapter, kv.EvalConfig(budgets=[0.9], **exact), progress=False)
        found.append((adapter, searched, [{k: v for k, v in row.items() if "ms" not in k} for row in rows]))
    assert adapters_equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1].paths[name], path) for name, path in found[1][1].paths.items())
    assert found[0][2] == found[1][2]
    assert not any(t.is_inference() for t in found[1][0].encode.values())
    cache = nested_cache(model, found[1][1], 0.9, sinks=2, window=6, context=256)
    assert feed(model, cache, ids[:1], [20, 4], [torch.enable_grad] * 2).isfinite().all()


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast"])
def test_training_is_the_same_in_every_mode(ids, tmp_path, mode):
    pytest.importorskip("accelerate")
    context, found = {**MODES, "autocast": autocast}[mode], []
    for within in (nullcontext, context):
        model = tiny_model("llama-gqa")
        with within():
            adapter = tiny_fit(model, ids.clone(), sinks=2, window=6)
            config = kv.TrainConfig(
                sinks=2, window=6, tokens=128, length=64, batch_size=1, budgets=(0.75, 0.5), progress=False,
                output_dir=tmp_path / str(len(found)),
            )  # fmt: skip
            trained = kv.train(model, None, ids.clone(), adapter, config)
        found.append(trained)
    assert adapters_equal(*found)


def test_weights_of_inference_mode_are_refused_by_name(ids):
    with torch.inference_mode():
        model = tiny_model("llama-gqa")
    with pytest.raises(kv.UnsupportedModelError, match="LlamaForCausalLM was loaded under torch.inference_mode"):
        tiny_fit(model, ids)


def test_an_adapter_that_was_read_in_inference_mode_serves_in_all(fitted, ids, tmp_path):
    made = fitted("llama-gqa")
    made.adapter.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        adapter = kv.KVAdapter.from_pretrained(tmp_path / "adapter")
        cache = nested_cache(made.model, adapter, 0.4, quantise=True, sinks=2, window=6, context=256)
        made.model(input_ids=ids[:1, :30], past_key_values=cache)
    assert feed(made.model, cache, ids[1:2], [20, 1], [torch.enable_grad] * 2).isfinite().all()


# Gradients


def loss_of(model, cache, ids, prefix, **more):
    """Of a continuation, after a prefix of embeddings."""
    model(inputs_embeds=prefix, past_key_values=cache, **more)
    return model(input_ids=ids, past_key_values=cache, labels=ids).loss


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
def test_gradients_reach_a_prefix_as_with_the_stock_cache(fitted, ids, family):
    """A learned prompt: at full budget its gradient is that of transformers' own cache."""
    made, found = fitted(family), []
    start = made.model.get_input_embeddings()(ids[:1, :20]).detach()
    for model, cache in (
        (made.stock, DynamicCache(config=made.stock.config)),
        (made.model, nested_cache(made.model, made.adapter, 1.0)),
    ):
        prefix = start.clone().requires_grad_()
        weight = model.model.layers[0].self_attn.v_proj.weight
        loss = loss_of(model, cache, ids[1:2, :9], prefix)
        found.append(torch.autograd.grad(loss, (prefix, weight)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        assert float(one.abs().max()) > 1e-4


@pytest.mark.parametrize("window", [0, 6])
def test_gradients_pass_through_compressed_states(fitted, ids, window):
    """Against differences: the text is read in three calls, and all of them matter."""
    made = fitted("llama-gqa")
    model = copy.deepcopy(made.model).double()
    direction = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = model.get_input_embeddings()(ids[:1, :24]).detach()

    def loss(prefix):
        cache = nested_cache(model, made.adapter, 0.6, sinks=2 if window else 0, window=window, context=256)
        model(inputs_embeds=prefix[:, :20], past_key_values=cache)
        model(inputs_embeds=prefix[:, 20:], past_key_values=cache)
        return model(input_ids=ids[1:2, :9], past_key_values=cache, labels=ids[1:2, :9]).loss

    prefix = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prefix), prefix)
    with torch.no_grad():
        ahead, behind = (loss(start + step * direction) for step in (1e-4, -1e-4))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-4, rel=2e-3)
    assert gradient[:, :20].abs().max() > 0 and gradient[:, 20:].abs().max() > 0


@pytest.mark.parametrize("name", ["full", "ranks", "bits"])
def test_storage_may_grow_before_the_backward_pass(ids, name):
    """Only queries are in the graph: it must not hold on to storage that later calls write to."""
    model = tiny_model("llama-gqa", num_hidden_layers=1)
    adapter = tiny_fit(model, ids)
    weight, found = model.model.layers[0].self_attn.q_proj.weight, []
    model.requires_grad_(False)
    weight.requires_grad_()
    for copied in (False, True):
        cache, losses = nested_cache(model, adapter, **{"context": 256, **CACHES[name]}), []
        for part in ids[:1, :30].split((4, 20, 6), 1):
            losses.append(model(input_ids=part, past_key_values=cache, labels=part).loss)
            cache = copy.deepcopy(cache) if copied else cache
        found.append(torch.autograd.grad(sum(losses), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert float(found[0].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["full", "ranks", "bits"])
def test_weights_are_trained_behind_a_frozen_prefix(fitted, ids, name):
    """A prompt that was read under no_grad, as LoRA trainings do; the continuation fits into the window."""
    made = fitted("llama-gqa")
    start = new_cache(made, name, window=16)
    with torch.no_grad():
        made.model(input_ids=ids[:1, :30], past_key_values=start)
    weight, losses = made.model.model.layers[0].self_attn.q_proj.weight, []
    for _ in range(2):  # a copy for each step: the prefix is as it was
        cache = copy.deepcopy(start)
        loss = made.model(input_ids=ids[1:2, :10], past_key_values=cache, labels=ids[1:2, :10]).loss
        (gradient,) = torch.autograd.grad(loss, weight)
        assert float(gradient.abs().max()) > 1e-4
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] and start.get_seq_length() == 30


def test_a_gradient_through_codes_is_refused_and_not_lost(fitted, ids):
    made = fitted("llama-gqa")
    prefix = made.model.get_input_embeddings()(ids[:1, :40]).detach().requires_grad_()
    for length in (9, 40):  # a short continuation reads codes of the prefix, a long one its own as well
        cache = new_cache(made, "bits")
        loss = loss_of(made.model, cache, ids[1:2, :length], prefix)
        assert torch.isfinite(loss)
        with pytest.raises(GradientError, match="quantised keys and values"):
            loss.backward()
    with torch.no_grad():
        frozen = new_cache(made, "bits")
        made.model(inputs_embeds=prefix, past_key_values=frozen)
    loss = made.model(input_ids=ids[1:2, :40], past_key_values=frozen, labels=ids[1:2, :40]).loss
    with pytest.raises(GradientError, match="read the prompt under torch.no_grad"):
        loss.backward()  # its own tokens left the window within the call
    made.model.zero_grad()


def test_a_copy_of_a_cache_in_a_graph_keeps_the_graph(fitted, ids):
    made = fitted("llama-gqa")
    prefix, found = made.model.get_input_embeddings()(ids[:1, :20]).detach().requires_grad_(), []
    for copied in (False, True):
        cache = new_cache(made, "ranks")
        made.model(inputs_embeds=prefix, past_key_values=cache)
        cache = copy.deepcopy(cache) if copied else cache
        loss = made.model(input_ids=ids[1:2, :9], past_key_values=cache, labels=ids[1:2, :9]).loss
        found.append(torch.autograd.grad(loss, prefix)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_no_graph_is_kept_by_a_cache_that_goes_on_without_one(fitted, ids):
    made = fitted("llama-gqa")
    for name in ("full", "ranks", "bits"):
        cache = new_cache(made, name)
        feed(made.model, cache, ids[:1], [30, 1], [torch.enable_grad, torch.no_grad])
        stored = [
            part.data
            for layer in cache.layers
            for group in layer.groups
            for part in group.rows
            if hasattr(part, "data")
        ]
        assert not any(data.requires_grad for data in stored)
