"""Exports: loaded by stock code they give the vectors of models cut by hand; nothing is left of those that fail."""

import importlib
import json
import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import encode
from nestling.embed.model.projection import Projection, fit_projections
from nestling.errors import ExportError, LadderError

from ..families import FAMILIES, HIDDEN, LAYERS, cut_folder, sentence_model, some_texts
from ..sets import scored

TEXTS = some_texts(17, seed=9)
module = importlib.import_module(
    "nestling.embed.export.export"
)  # the package's attribute of that name is the function


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=tolerance)


def unit(vectors):
    return torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_a_model_cut_by_hand(backbones, tmp_path, family, capfd):
    model = sentence_model(backbones(family))
    made = export(model, "2x8", tmp_path / "cup")
    cut = shutil.copytree(backbones(family), tmp_path / "cut")
    cut_folder(cut, 2)
    capfd.readouterr()
    loaded = SentenceTransformer(str(tmp_path / "cup"), device="cpu")  # stock, and no remote code
    assert "MISSING" not in "".join(capfd.readouterr())  # no user should read that weights are missing
    assert [type(part).__name__ for part in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    expected = sentence_model(cut).encode(TEXTS)[:, :8]
    close(loaded.encode(TEXTS), unit(expected))
    assert made.cup == Size(2, 8) and made.folder == tmp_path / "cup" and made.difference <= 1e-5
    assert made.onnx_difference is None and made.int8_cosine is None
    assert made.nbytes == sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cup", "cut"]  # no work folder is left


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_poolings_and_padding_on_either_side(encoder, tmp_path, pooling, side):
    model = encoder("qwen3", pooling, side)
    export(model, "3x16", tmp_path / "cup")
    loaded = SentenceTransformer(str(tmp_path / "cup"), device="cpu")
    assert loaded.tokenizer.padding_side == side and loaded[1].pooling_mode == pooling
    close(loaded.encode(TEXTS), unit(encode(model, TEXTS, {3: 16})[3]))


def test_several_poolings_in_a_row(encoder, tmp_path):
    model = encoder(pooling=("cls", "mean"))
    export(model, (2, 40), tmp_path / "cup")
    loaded = SentenceTransformer(str(tmp_path / "cup"), device="cpu")
    assert loaded.encode(TEXTS).shape == (17, 40)
    close(loaded.encode(TEXTS), unit(encode(model, TEXTS, {2: 40})[2]))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gemma3"])
def test_only_the_weights_of_kept_layers_are_written(backbones, tmp_path, family):
    model = sentence_model(backbones(family))
    folder = export(model, "2x8", tmp_path / "cup").folder
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = {name: file.get_slice(name).get_shape() for name in file.keys()}
    kept = {
        name: list(p.shape)
        for name, p in model[0].model.named_parameters()
        if not any(f"{part}.{i}." in name for part in ("layer", "layers") for i in (2, 3)) and "pooler" not in name
    }
    assert written == kept
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(math.prod(shape) for shape in kept.values()) + 100 * len(kept) + 1000
    config = json.loads((folder / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layers")) == 2
    assert len(config.get("layer_types", [0, 0])) == 2


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("cup", ["2x8", "4x32"])
def test_a_projection_is_folded_into_the_dense(encoder, tmp_path, family, centred, cup):
    model, size = encoder(family), Size.parse(cup)
    turn = fit_projections(model, some_texts(60), [size.layers], kind="centred" if centred else "pca")[size.layers]
    folder = export(model, cup, tmp_path / "cup", projections={size.layers: turn}).folder
    loaded = SentenceTransformer(str(folder), device="cpu")
    pooled = encode(model, TEXTS, {size.layers: HIDDEN})[size.layers]
    centre = turn.mean if centred else torch.zeros(HIDDEN)
    close(loaded.encode(TEXTS), unit((pooled - centre) @ turn.encode[:, : size.dims]))
    dense = next(part for part in loaded if isinstance(part, Dense))
    assert (dense.linear.bias is not None) == centred
    assert json.loads((folder / "nestling.json").read_text())["projected"] is True


def test_the_full_cup_needs_no_dense(encoder, tmp_path):
    model = encoder()
    loaded = SentenceTransformer(str(export(model, f"{LAYERS}x{HIDDEN}", tmp_path / "cup").folder), device="cpu")
    assert not any(isinstance(part, Dense) for part in loaded)
    close(loaded.encode(TEXTS), unit(model.encode(TEXTS)))


def with_dense(model, *layers):
    torch.manual_seed(1)
    for out, bias, activation in layers:
        model.append(Dense(model.get_embedding_dimension(), out, bias=bias, activation_function=activation))
    model.append(Normalize())
    return model.eval()


@pytest.mark.parametrize("turned", [False, True])
def test_linear_maps_of_the_model_become_one(encoder, tmp_path, turned):
    model = with_dense(encoder(), (48, True, None), (20, False, None))
    turns = fit_projections(model, some_texts(60), [2]) if turned else None
    loaded = SentenceTransformer(str(export(model, "2x8", tmp_path / "cup", projections=turns).folder), device="cpu")
    assert [type(part).__name__ for part in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert loaded[2].linear.weight.shape == (8, HIDDEN) and loaded[2].linear.bias is not None
    close(loaded.encode(TEXTS), unit(encode(model, TEXTS, {2: 8}, projections=turns)[2]))


def test_maps_with_an_activation_stay(encoder, tmp_path):
    model = with_dense(encoder(), (20, True, torch.nn.Tanh()))
    loaded = SentenceTransformer(str(export(model, "2x8", tmp_path / "cup").folder), device="cpu")
    assert [type(part).__name__ for part in loaded] == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    assert isinstance(loaded[2].activation_function, torch.nn.Tanh)
    close(loaded.encode(TEXTS), unit(encode(model, TEXTS, {2: 8})[2]))


def test_prompts_come_along(backbones, tmp_path):
    model = sentence_model(backbones("bert"), include_prompt=False)
    model.prompts = {"query": "w11 w12 ", "passage": "w13 ", "document": None}
    model.default_prompt_name = "passage"
    loaded = SentenceTransformer(str(export(model, "2x8", tmp_path / "cup").folder), device="cpu")
    assert loaded.prompts == {"query": "w11 w12 ", "passage": "w13 ", "document": "w13 "}
    assert loaded.default_prompt_name == "passage" and loaded.similarity_fn_name == "cosine"
    for prompt in ("w11 w12 ", "w13 ", ""):
        close(loaded.encode(TEXTS, prompt=prompt), unit(encode(model, TEXTS, {2: 8}, prompt=prompt)[2]))


def test_the_model_is_left_as_it_was(encoder, tmp_path):
    model = encoder("bert")
    model.train()
    before, config = model.encode(TEXTS), model[0].model.config.to_dict()
    model.train()
    export(model, "2x8", tmp_path / "cup")
    assert model.training and model[0].model.pooler is not None and model[0].model.config.to_dict() == config
    assert len(model[0].model.encoder.layer) == LAYERS
    close(model.encode(TEXTS), before, 0)


def test_an_export_measures_like_its_cup(encoder, tmp_path):
    model, sts = encoder("modernbert"), {"s": scored()}
    (row,) = GridEvaluator("2x8", sts=sts).rows(model)
    loaded = SentenceTransformer(str(export(model, "2x8", tmp_path / "cup").folder), device="cpu")
    (again,) = GridEvaluator("2x8", sts=sts).rows(loaded)
    assert again["s"] == pytest.approx(row["s"], abs=1e-3)


def test_an_export_can_be_cut_again(encoder, tmp_path):
    model = encoder("gemma3")
    first = SentenceTransformer(str(export(model, "3x16", tmp_path / "first").folder), device="cpu")
    second = SentenceTransformer(str(export(first, "1x4", tmp_path / "second").folder), device="cpu")
    assert [type(part).__name__ for part in second] == ["Transformer", "Pooling", "Dense", "Normalize"]
    close(second.encode(TEXTS), unit(encode(model, TEXTS, {1: 4})[1]))


def test_the_ladder_and_the_card(encoder, tmp_path):
    model, ladder = encoder(), Ladder.parse("1x4,2x4,2x8,2x16,4x32")
    rows = [{"model": "tiny", "method": "srl", "size": cup, "mean_sts": 0.5} for cup in ("2x8", "4x32")]
    folder = export(model, "2x8", tmp_path / "cup", ladder=str(ladder), rows=rows).folder
    stored = json.loads((folder / "nestling.json").read_text())
    assert Ladder.from_json(stored) == ladder and stored["cup"] == "2x8"
    config = json.loads((folder / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [4, 8] and config["is_matryoshka"] is True
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: sentence-transformers\n") and "2x8" in text
    assert "| tiny | srl | 2x8 | 50 |" in text and "| 4x32 |" not in text
    written = [path.read_text("utf-8") for path in folder.rglob("*") if path.suffix in (".json", ".md")]
    assert not any(str(tmp_path.parent) in text for text in written)  # where the model was read, too


def test_the_card_explains_what_was_measured(encoder, tmp_path):
    for name, row, said in (
        ("labelled", {"mean_sts": 0.5}, "nDCG@10 and recall@100"),
        ("agreeing", {"agreement": 0.5}, "text's similarities to all others"),
    ):
        folder = export(encoder(), "2x8", tmp_path / name, rows=[{"size": "2x8", "minutes": 1.5} | row]).folder
        card = (folder / "README.md").read_text()
        assert said in card and ("nDCG" in card) == (name == "labelled") and "| 2x8 | 1.5 | 50 |" in card


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.integers(1, LAYERS), dims=st.integers(1, HIDDEN), seed=st.integers(0, 99))
def test_any_cup_with_any_projection(encoder, tmp_path, layers, dims, seed):
    model = encoder("distilbert")
    rng = torch.Generator().manual_seed(seed)
    turn = Projection(
        torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=rng))[0], torch.randn(HIDDEN, generator=rng)
    )
    folder = tmp_path / "cup"
    shutil.rmtree(folder, ignore_errors=True)
    assert export(model, Size(layers, dims), folder, projections={layers: turn}).difference <= 1e-5
    vectors = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert vectors.shape == (17, dims)
    close((vectors**2).sum(1), torch.ones(17))


# What is refused


@pytest.mark.parametrize(
    "cup, options, error, expected",
    [
        ("5x8", {}, LadderError, "5x8 is deeper than the model"),
        ("2x33", {}, LadderError, "2x33 is wider than the model"),
        ("0x8", {}, LadderError, "must be an integer from 1 on"),
        ("large", {}, LadderError, "'large' is no size"),
        ("2x8", {"int8": True}, ExportError, "ask for onnx as well"),
        ("2x8", {"ladder": "2x8,5x32"}, LadderError, "5x32 is deeper than the model"),
        ("2x8", {"ladder": "2x8,large"}, LadderError, "'large' is no size"),
        (
            "2x8",
            {"projections": {2: Projection(torch.eye(8))}},
            ExportError,
            "projection is of width 8, the embeddings of 32",
        ),
        (
            "2x8",
            {"projections": {1: Projection(torch.eye(32))}},
            ExportError,
            r"no projection for 2x8, only for layers \[1\]",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(encoder, tmp_path, cup, options, error, expected):
    with pytest.raises(error, match=expected):
        export(encoder(), cup, tmp_path / "cup", **options)
    assert not list(tmp_path.iterdir())


def test_half_precision_and_adapters_are_refused(encoder, tmp_path):
    with pytest.raises(ExportError, match="the weights are bfloat16: load the model in float32"):
        export(encoder().bfloat16(), "2x8", tmp_path / "cup")
    model = encoder()
    model[0].model.peft_config = {"default": object()}
    with pytest.raises(ExportError, match="has an adapter"):
        export(model, "2x8", tmp_path / "cup")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty", "file"])
def test_what_exists_is_kept(encoder, tmp_path, kind):
    target = tmp_path / "cup"
    target.write_text("mine") if kind == "file" else target.mkdir()
    if kind == "folder":
        (target / "mine").write_text("mine")
    with pytest.raises(ExportError, match="exists: choose another folder"):
        export(encoder(), "2x8", target)
    assert [path.name for path in tmp_path.iterdir()] == ["cup"]
    assert kind == "empty" or (target if kind == "file" else target / "mine").read_text() == "mine"


def test_a_folder_that_cannot_be_made(encoder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="cannot write .*: choose another folder"):
        export(encoder(), "2x8", tmp_path / "file" / "cup")


def test_an_export_that_differs_is_thrown_away(encoder, tmp_path, monkeypatch):
    model, fill = encoder(), module._fill
    monkeypatch.setattr(module, "_fill", lambda linear, weight, bias: fill(linear, weight.roll(1, 0), bias))
    with pytest.raises(ExportError, match="the export's vectors differ from the model's by"):
        export(model, "2x8", tmp_path / "deep" / "cup")
    monkeypatch.setattr(module, "_fill", fill)
    with monkeypatch.context() as patch:
        patch.setattr(module, "rewrite", lambda folder, *args: (folder / "model.safetensors").unlink())
        with pytest.raises(ExportError, match=r"the export cannot be loaded again \[OSError"):
            export(model, "2x8", tmp_path / "deep" / "cup")
    with torch.no_grad():
        model[0].model.encoder.layer[0].output.dense.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        export(model, "2x8", tmp_path / "deep" / "cup")
    assert not list((tmp_path / "deep").iterdir())


def test_a_killed_export_leaves_no_folder_of_that_name(encoder, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        export(encoder(), "2x8", tmp_path / "cup")
    assert not list(tmp_path.iterdir())
