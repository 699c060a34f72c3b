"""Taps against models that are really shallower: configs cut by hand, the same weights, loaded by stock code."""

import shutil
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from nestling.embed.model.taps import taps
from nestling.errors import LadderError, UnsupportedEncoderError
from nestling.models import models_folder

from ..families import FAMILIES, HIDDEN, LAYERS, PRE_NORM, cut_folder, sentence_model, some_texts

DEPTHS = range(1, LAYERS + 1)
TOLERANCE = dict(rtol=0, atol=1e-5)
MINILM = models_folder() / "minilm"


def truncated(folder, tmp_path, depth, pooling="mean", **options):
    """The independent k-layer model."""
    cut = shutil.copytree(folder, tmp_path / f"cut-{depth}", dirs_exist_ok=True)
    cut_folder(cut, depth)
    return sentence_model(cut, pooling, **options)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_is_the_truncated_model(family, pooling, side, backbones, tmp_path):
    folder = backbones(family, side)
    model = sentence_model(folder, pooling)
    features = model.preprocess(some_texts(5))
    assert (features["attention_mask"][:, 0 if side == "left" else -1] == 0).any()  # there is padding on that side
    with torch.no_grad():
        tapped = taps(model, features, DEPTHS)
        assert list(tapped) == list(DEPTHS)
        for depth, vectors in tapped.items():
            expected = truncated(folder, tmp_path, depth, pooling)(dict(features))["sentence_embedding"]
            torch.testing.assert_close(vectors, expected, **TOLERANCE)
            torch.testing.assert_close(taps(model, features, [depth])[depth], expected, **TOLERANCE)  # stops there


@pytest.mark.parametrize("pooling", ["max", "mean_sqrt_len_tokens", "weightedmean", ("mean", "cls")])
def test_every_pooling(pooling, backbones, tmp_path):
    model = sentence_model(backbones("modernbert"), pooling)
    features = model.preprocess(some_texts(5))
    with torch.no_grad():
        expected = truncated(backbones("modernbert"), tmp_path, 2, pooling)(dict(features))["sentence_embedding"]
        torch.testing.assert_close(taps(model, features, [2, 4])[2], expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_are_left_out_where_the_model_says_so(family, side, backbones, tmp_path):
    folder = backbones(family, side)
    model = sentence_model(folder, include_prompt=False)
    features = model.preprocess(some_texts(5), prompt="w7 w8 w9 ")
    with torch.no_grad():
        tapped = taps(model, features, [2, 4])
        expected = truncated(folder, tmp_path, 2, include_prompt=False)(dict(features))["sentence_embedding"]
        torch.testing.assert_close(tapped[2], expected, **TOLERANCE)
        with_prompt = taps(sentence_model(folder), features, [2, 4])
    assert (with_prompt[2] - tapped[2]).abs().max() > 1e-2


def test_what_is_trained_behind_the_pooling_is_applied(backbones, tmp_path):
    """A Dense belongs to the vector of every depth; a last Normalize is left to whoever cuts the vector."""
    folder = backbones("gemma3")
    tail = [Dense(HIDDEN, 48), Dense(48, 24, activation_function=None)]
    model = SentenceTransformer(modules=[*sentence_model(folder), *tail, Normalize()], device="cpu")
    features = model.preprocess(some_texts(5))
    with torch.no_grad():
        tapped = taps(model, features, [1, 4])
        cut = SentenceTransformer(modules=[*truncated(folder, tmp_path, 1), *tail], device="cpu")
        torch.testing.assert_close(tapped[1], cut(dict(features))["sentence_embedding"], **TOLERANCE)
        unit = model(dict(features))["sentence_embedding"]
        torch.testing.assert_close(nn.functional.normalize(tapped[4], dim=-1), unit, **TOLERANCE)
    assert tapped[4].shape == (5, 24) and (tapped[4].norm(dim=-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(PRE_NORM))
def test_states_between_layers_are_not_what_is_served(family, encoder):
    """The trap that taps avoid: on these families the hidden state of a layer lacks the norm of the shorter model."""
    model = encoder(family)
    features = model.preprocess(some_texts(5))
    with torch.no_grad():
        states = (
            model[0]
            .model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
            )
            .hidden_states
        )
        naive = model[1]({**features, "token_embeddings": states[2]})["sentence_embedding"]
        assert (naive - taps(model, features, [2, 4])[2]).abs().max() > 0.1


@given(st.sets(st.integers(1, LAYERS), min_size=1), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_what_is_asked_for_does_not_matter(tiny_bert, depths, count, seed):
    """A depth's vector is the same whichever others are asked for, and the rows of a batch do not meet."""
    features = tiny_bert.preprocess(some_texts(count, seed))
    with torch.no_grad():
        every, some = taps(tiny_bert, features, DEPTHS), taps(tiny_bert, features, depths)
        assert list(some) == sorted(depths)
        alone = taps(tiny_bert, tiny_bert.preprocess(some_texts(count, seed)[:1]), depths)
    for depth in depths:
        torch.testing.assert_close(some[depth], every[depth], rtol=0, atol=1e-6)
        torch.testing.assert_close(some[depth][:1], alone[depth], **TOLERANCE)


@pytest.fixture(scope="module")
def tiny_bert(backbones):
    return sentence_model(backbones("bert"))


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "t5"])
def test_layers_above_the_deepest_are_not_run(family, encoder):
    model = encoder(family)
    features = model.preprocess(some_texts(3))
    taps(model, features, [1])  # the first call also probes the model
    layers, ran = _layers(model), []
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    taps(model, features, [1, 3])
    assert ran == [1, 2, 3]
    assert _layers(model) is layers and len(layers) == LAYERS
    assert all(len(layer._forward_hooks) == 1 for layer in layers)
    assert not model[0].model.config.output_hidden_states


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "t5"])
def test_states_that_nobody_asked_for_are_not_kept(family, encoder):
    model = encoder(family)
    features = model.preprocess(some_texts(3))
    taps(model, features, [1])
    states, alive = [], []
    for layer in _layers(model):
        layer.register_forward_pre_hook(lambda *_: alive.append([state() is not None for state in states]))
        layer.register_forward_hook(
            lambda module, args, output: states.append(ref(output[0] if isinstance(output, tuple) else output))
        )
    with torch.no_grad():
        tapped = taps(model, features, [1, 4])
    assert alive[3][:2] == [True, False]  # when layer 4 starts, the state of layer 1 is there, that of layer 2 is not
    assert not any(state() is not None for state in states)
    assert list(tapped) == [1, 4]


def _layers(model) -> nn.ModuleList:
    lists = [m for m in model[0].model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    return lists[0]


def test_an_error_leaves_the_model_whole(encoder):
    model = encoder("bert")
    features = model.preprocess(some_texts(3))
    before = taps(model, features, DEPTHS)
    layers = _layers(model)
    handle = layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taps(model, features, [1, 3])
    handle.remove()
    assert _layers(model) is layers and len(layers) == LAYERS
    assert not any(layer._forward_hooks for layer in layers)
    torch.testing.assert_close(taps(model, features, DEPTHS), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_truncated_model(family, backbones, tmp_path):
    folder = backbones(family)
    model, cut = sentence_model(folder), truncated(folder, tmp_path, 2)
    features = model.preprocess(some_texts(4))
    weights = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    (taps(model, features, DEPTHS)[2].tanh() @ weights).sum().backward()
    (cut(dict(features))["sentence_embedding"].tanh() @ weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in cut.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 10
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "distilbert"])
def test_gradient_checkpointing(family, reentrant, encoder):
    """Layers that are computed again in the backward give the same gradients, to every tap, dropout and all."""
    model = encoder(family).train()
    features = model.preprocess(some_texts(4))

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        sum(vectors.square().sum() for vectors in taps(model, features, [1, 2, 4]).values()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    body = model[0].model
    enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_compiled_models(encoder):
    """Whether the model was wrapped or compiled in place, before its first call or after."""
    features = encoder().preprocess(some_texts(4))
    with torch.no_grad():
        expected = taps(encoder(), features, [1, 3])
        in_place = encoder()
        in_place.compile(backend="eager")
        layer = encoder()
        layer[0].model.encoder.layer[1].compile(backend="eager")
        for model in (torch.compile(encoder(), backend="eager"), in_place, layer):
            model(dict(features))
            for _ in range(2):
                found = taps(model, features, [1, 3])
                torch.testing.assert_close(found, expected, **TOLERANCE)
            other = model(dict(features))["sentence_embedding"]
            torch.testing.assert_close(other, encoder()(dict(features))["sentence_embedding"], **TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_half_precision(family, encoder):
    """In bf16 throughout, and under autocast, taps have the dtype of the model's own embedding and are near to it."""
    exact = taps(encoder(family), encoder(family).preprocess(some_texts(4)), DEPTHS)
    model = encoder(family)
    features = model.preprocess(some_texts(4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = taps(model, features, DEPTHS)
        assert mixed[2].dtype == model(dict(features))["sentence_embedding"].dtype
    half = taps(model.bfloat16(), features, DEPTHS)
    assert half[2].dtype == torch.bfloat16
    for depth in DEPTHS:
        for found in (mixed, half):
            assert torch.cosine_similarity(found[depth].float(), exact[depth]).min() > 0.99


@pytest.mark.parametrize("layers", [[], [0], [-1], [1, LAYERS + 1]])
def test_depths_that_are_not_there(layers, encoder):
    with pytest.raises(LadderError, match="expected some of 1 to 4"):
        taps(encoder(), encoder().preprocess(["w5"]), layers)


def test_texts_that_the_model_pads_itself(encoder):
    model = encoder()
    transformer = model[0]
    features = model.preprocess(some_texts(3))
    taps(model, features, [1])
    transformer.register_forward_hook(
        lambda module, args, out: {**out, "token_embeddings": out["token_embeddings"][:, :-1]}
    )
    with pytest.raises(UnsupportedEncoderError, match="BertModel pads its texts itself"):
        taps(model, features, [1, 2])


def test_a_gradient_that_is_hidden_is_not_missed_in_silence(encoder):
    """As by reentrant checkpointing around a layer's hooks. Frozen layers have none to hide."""
    model = encoder()
    features = model.preprocess(some_texts(3))
    layer = model[0].model.encoder.layer[1]
    layer.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UnsupportedEncoderError, match="hides the gradient of layer 2.*use_reentrant"):
        taps(model, features, [2, 4])
    with torch.no_grad():
        taps(model, features, [2, 4])
    layer.requires_grad_(False)
    taps(model, features, [2, 4])[4].sum().backward()


def test_empty_and_equal_texts(encoder):
    model = encoder()
    with torch.no_grad():
        tapped = taps(model, model.preprocess(["", "w9", "w9", ""]), [1, 4])
    for vectors in tapped.values():
        assert vectors.isfinite().all()
        torch.testing.assert_close(vectors[0], vectors[3])
        torch.testing.assert_close(vectors[1], vectors[2])


@pytest.mark.real
@pytest.mark.skipif(not MINILM.is_dir(), reason="no folder of minilm")
def test_minilm(tmp_path):
    """Real weights, with the folder's own pooling and normalisation: three layers of all-MiniLM-L6-v2."""
    cut = shutil.copytree(MINILM, tmp_path / "cut")
    cut_folder(cut, 3)
    texts = ["A lighthouse keeper wrote a letter.", "Rain.", "The letter was written in the lighthouse."]
    model, shallow = (SentenceTransformer(str(folder), device="cpu") for folder in (MINILM, cut))
    with torch.no_grad():
        found = taps(model, model.preprocess(texts), [3, 6])
    for depth, served in ((3, shallow), (6, model)):
        unit = nn.functional.normalize(found[depth], dim=-1)
        torch.testing.assert_close(unit, served.encode(texts, convert_to_tensor=True), **TOLERANCE)
