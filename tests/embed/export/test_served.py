"""What is served is what was trained: prompts, similarities, widths and projections of the model, by stock readers."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.util import pairwise_dot_score
from torch.nn.functional import normalize

from nestling.embed.evaluation.agreement import agreement
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import encode, stored_prompts
from nestling.embed.model.folder import load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.own import own_projections
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.model.similarity import Similarity
from nestling.embed.model.taps import taps
from nestling.errors import ExportError, NestlingError, OptionError, UnsupportedEncoderError

from ..families import FAMILIES, WORDS, sentence_model, some_texts
from ..sets import scored, searched
from ..ways import align, train

TEXTS = some_texts(17, seed=9)
E5 = {"query": "w11 w12 ", "passage": "w13 "}


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def served(model, cup, folder, **options) -> SentenceTransformer:
    """What stock code loads of an export."""
    return SentenceTransformer(str(export(model, cup, folder, **options).folder), device="cpu")


# Prompts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("included", [True, False])
def test_stock_methods_use_the_prompts_of_training(backbones, tmp_path, family, included):
    model = sentence_model(backbones(family), include_prompt=included)
    model.prompts, model.default_prompt_name = {**E5, "usual": "w20 ", "document": ""}, "usual"
    cup = served(model, "2x8", tmp_path / "cup")
    for method, prompt in ((cup.encode, "w20 "), (cup.encode_query, "w11 w12 "), (cup.encode_document, "w13 ")):
        close(method(TEXTS), normalize(encode(model, TEXTS, {2: 8}, prompt=prompt)[2], dim=-1))
    close(cup.encode(TEXTS, prompt=""), normalize(encode(model, TEXTS, {2: 8})[2], dim=-1))


@pytest.mark.parametrize(
    "prompts, default, query, document",
    [
        ({"corpus": "w13 "}, None, "", "w13 "),
        ({"document": "w14 ", "passage": "w13 "}, None, "", "w14 "),
        ({"usual": "w20 "}, "usual", "w20 ", "w20 "),  # no such prompts are named: stock methods take the usual one
        ({"usual": "w20 ", "query": "", "document": ""}, "usual", "", ""),
        ({"query": None, "passage": None}, None, "", ""),
    ],
)
def test_what_stock_methods_of_the_model_use_is_kept(encoder, tmp_path, prompts, default, query, document):
    model = encoder()
    model.prompts, model.default_prompt_name = prompts, default
    assert stored_prompts(model) == {"sts": prompts.get(default or "") or "", "query": query, "passage": document}
    cup = served(model, "2x8", tmp_path / "cup")
    close(cup.encode_query(TEXTS), cup.encode(TEXTS, prompt=query))
    close(cup.encode_document(TEXTS), cup.encode(TEXTS, prompt=document))


def rows(*columns):
    return [dict(zip(columns, pair, strict=True)) for pair in zip(TEXTS[:8], TEXTS[8:16], strict=True)]


@pytest.mark.parametrize(
    "columns, asked, uses",
    [
        (("query", "passage"), None, {"sts": "", "query": "w11 w12 ", "passage": "w13 "}),
        (("query", "passage"), {"query": "w30 "}, {"sts": "", "query": "w30 ", "passage": "w13 "}),
        (("query", "passage"), "", {"sts": "", "query": "", "passage": ""}),
        (("anchor", "positive"), {"anchor": "w30 "}, {"sts": "", "query": "w30 ", "passage": ""}),
        (("anchor", "positive"), "w30 ", {"sts": "w30 ", "query": "w11 w12 ", "passage": "w13 "}),
        (("anchor", "positive"), "w13 ", {"sts": "w13 ", "query": "w11 w12 ", "passage": "w13 "}),
    ],
)
def test_prompts_of_a_training_become_the_models_own(encoder, tmp_path, columns, asked, uses):
    model = encoder()
    model.prompts = dict(E5)
    options = dict(steps=1, progress=False, save_strategy="no", projection="none")
    trained = train(model, rows(*columns), "2x8,4x32", folder=tmp_path / "out", prompts=asked, **options)
    assert stored_prompts(model) == uses
    whole = SentenceTransformer(str(trained.folder), device="cpu")
    cup = served(load_encoder(trained.folder), "2x8", tmp_path / "cup")
    for reader, size in ((whole, {4: 32}), (cup, {2: 8})):
        for use, method in (
            ("sts", reader.encode),
            ("query", reader.encode_query),
            ("passage", reader.encode_document),
        ):
            (vectors,) = encode(model, TEXTS, size, prompt=uses[use]).values()
            close(normalize(torch.tensor(method(TEXTS)), dim=-1), normalize(vectors, dim=-1))


def test_a_training_that_fails_leaves_the_prompts(encoder, tmp_path, monkeypatch):
    model = encoder()
    model.prompts, model.default_prompt_name = {"usual": "w20 "}, "usual"
    monkeypatch.setattr("nestling.embed.training.run.SizesTrainer", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, TEXTS, "2x8,4x32", folder=tmp_path / "out", steps=1, prompts="w9 ", progress=False)
    assert model.prompts == {"usual": "w20 "} and model.default_prompt_name == "usual"


def test_an_aligned_folder_has_the_prompts_that_stock_code_uses(encoder, tmp_path):
    model = encoder()
    model.prompts = {**E5, "document": ""}
    align(model, TEXTS, "2x8,4x32", folder=tmp_path / "out", progress=False)
    assert model.prompts == {**E5, "document": ""}
    whole = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    close(whole.encode_document(TEXTS), model.encode(TEXTS, prompt="w13 "))


def test_alignment_leaves_prompts_out_where_pooling_does(backbones, tmp_path):
    """The vectors that are aligned are those that will be served."""
    model = sentence_model(backbones("bert"), include_prompt=False)
    found = align(model, TEXTS, "2x8,4x32", folder=tmp_path / "out", prompt="w11 w12 ", progress=False).projections[2]
    vectors = encode(model, TEXTS, {2: 32, 4: 32}, prompt="w11 w12 ")
    close(found.mean, vectors[2].mean(0))
    assert (vectors[2].mean(0) - encode(model, [f"w11 w12 {t}" for t in TEXTS], {2: 32})[2].mean(0)).abs().max() > 1e-3


def test_graphs_that_cannot_leave_prompts_out_are_refused(backbones, tmp_path):
    pytest.importorskip("onnxruntime")
    model = sentence_model(backbones("bert"), include_prompt=False)
    model.prompts = dict(E5)
    with pytest.raises(ExportError, match="include_prompt=False.*leave ONNX out"):
        export(model, "2x8", tmp_path / "cup", onnx=True)
    assert not list(tmp_path.iterdir())


# Similarities


def measured(name, family="bert", pooling="max", tail=()):
    def make(backbones):
        model = sentence_model(backbones(family), pooling)
        for module in tail:
            model.append(module)
        model.similarity_fn_name = name
        return model.eval()

    return make


@pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("pooling", ["max", "mean_sqrt_len_tokens", "cls"])
def test_lengths_are_kept_where_they_count(backbones, tmp_path, name, pooling):
    model = measured(name, pooling=pooling)(backbones)
    for size in ((2, 8), (4, 32)):
        cup = served(model, size, tmp_path / f"cup-{size[0]}")
        wanted = encode(model, TEXTS, {size[0]: size[1]})[size[0]]
        assert cup.similarity_fn_name == name and not any(isinstance(part, Normalize) for part in cup)
        close(cup.encode(TEXTS), wanted, 1e-4)
    close(cup.similarity(cup.encode(TEXTS), cup.encode(TEXTS)), model.similarity(*[model.encode(TEXTS)] * 2), 1e-3)
    assert (wanted.norm(dim=-1).max() - 1).abs() > 0.5
    assert "vectors whose lengths count" in (tmp_path / "cup-2" / "README.md").read_text()


@pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
def test_models_that_normalise_by_themselves_still_do(backbones, tmp_path, name):
    model = measured(name, tail=[Normalize()])(backbones)
    cup = served(model, "2x8", tmp_path / "cup")
    assert cup.similarity_fn_name == name and isinstance(cup[-1], Normalize)
    close(cup.encode(TEXTS), normalize(encode(model, TEXTS, {2: 8})[2], dim=-1))


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_a_model_is_measured_by_its_own_similarity(backbones, name):
    """As stock evaluators measure it, which take the model's own as well."""
    model, pairs, data = measured(name)(backbones), scored(), searched()
    (row,) = GridEvaluator("4x32", sts={"s": pairs}, retrieval={"r": data}).rows(model)
    first, second, scores = zip(*((p["sentence1"], p["sentence2"], p["score"]) for p in pairs), strict=True)
    stock = EmbeddingSimilarityEvaluator(first, second, scores)(model)
    assert row["s"] == pytest.approx(stock[f"spearman_{name}"], abs=1e-4)
    relevant = {query: set(found) for query, found in data.relevant.items()}
    stock = InformationRetrievalEvaluator(data.queries, data.corpus, relevant, ndcg_at_k=[10])(model)
    assert row["ndcg_r"] == pytest.approx(stock[f"{name}_ndcg@10"], abs=0.02)  # it has no graded judgements


@pytest.mark.parametrize("name, kind", [("dot", "aligned"), ("dot", "pca"), ("euclidean", "aligned")])
def test_projections_keep_what_counts(backbones, name, kind):
    """Dot products or distances of aligned cups are near the full model's; plain cuts' are not."""
    model = measured(name)(backbones)
    texts = some_texts(300, seed=2)
    found = encode(model, texts, {3: 32, 4: 32})
    turns, similarity = fit_projections(model, texts, [3, 4], kind=kind), Similarity.of(model)
    wanted = similarity.scores(found[4], found[4])
    close(similarity.scores(turns[4](found[4]), turns[4](found[4])), wanted, 2e-2)  # at full size nothing changes
    if kind == "aligned":
        aligned, plain = (similarity.scores(x, x) for x in (turns[3](found[3])[:, :16], found[3][:, :16]))
        assert (aligned - wanted).abs().mean() < 0.5 * (plain - wanted).abs().mean()
    assert (turns[3].mean is None) == (name == "dot")


def test_projections_that_would_change_it_are_refused(backbones, tmp_path):
    with pytest.raises(UnsupportedEncoderError, match="Manhattan distance"):
        align(measured("manhattan")(backbones), TEXTS, "2x8,4x32", folder=tmp_path / "out", progress=False)
    with pytest.raises(OptionError, match="centred"):
        fit_projections(measured("dot")(backbones), TEXTS, [2], kind="centred")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
def test_training_that_would_make_cosines_of_it_is_refused(backbones, tmp_path, name):
    model = measured(name)(backbones)
    for data, options in (
        (TEXTS, {}),
        (rows("anchor", "positive"), {}),
        (scored(), {"loss": CoSENTLoss(model)}),
        (rows("anchor", "positive"), {"teacher": sentence_model(backbones("bert"))}),
    ):
        with pytest.raises(OptionError, match="lengths count"):
            train(model, data, "2x8,4x32", folder=tmp_path / "out", steps=1, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_training_by_dot_products_with_a_loss_of_them(backbones, tmp_path):
    model = measured("dot")(backbones)
    loss = CoSENTLoss(model, similarity_fct=pairwise_dot_score)
    options = dict(steps=2, progress=False, save_strategy="no", normalize=False)
    trained = train(model, scored(), "2x8,4x32", folder=tmp_path / "out", loss=loss, **options)
    cup = served(load_encoder(trained.folder), "2x8", tmp_path / "cup")
    assert cup.similarity_fn_name == "dot"
    wanted = encode(model, TEXTS, {2: 8}, projections=trained.projections)[2]
    close(cup.encode(TEXTS), wanted, 1e-4 * float(wanted.abs().max()))


# Widths


@pytest.mark.parametrize("tail", [(), (Dense(32, 24, activation_function=None), Normalize()), (Dense(32, 24),)])
def test_the_width_of_a_model_is_its_truncate_dim(backbones, tmp_path, tail):
    model = measured("cosine", pooling="mean", tail=tail)(backbones)
    model.truncate_dim = 16
    assert Encoder.of(model).dims == 16
    assert taps(model, model.preprocess(TEXTS), [2, 4])[4].shape == (17, 16)
    close(normalize(encode(model, TEXTS, {4: 16})[4], dim=-1), normalize(torch.tensor(model.encode(TEXTS)), dim=-1))
    aligned = align(model, TEXTS, "2x8,4x16", folder=tmp_path / "out", progress=False)
    loaded = load_encoder(aligned.folder).cpu()
    assert loaded.truncate_dim == 16 and loaded.encode(TEXTS).shape == (17, 16)
    for size, turns in (("2x8", aligned.projections), ("4x16", aligned.projections), ("2x16", {})):
        cup = served(loaded, size, tmp_path / f"{size}-{len(turns)}", projections=turns)
        layers, dims = Size.parse(size).layers, Size.parse(size).dims
        wanted = encode(model, TEXTS, {layers: dims}, projections=turns)[layers]
        close(cup.encode(TEXTS), normalize(wanted, dim=-1))
        assert cup.truncate_dim is None and cup.get_embedding_dimension() == dims
    with pytest.raises(NestlingError, match="4x24 is wider than the model, which is 4x16"):
        export(loaded, "4x24", tmp_path / "wide")


def test_widths_that_cannot_be(encoder, backbones):
    model = encoder()
    model.truncate_dim = 0
    with pytest.raises(UnsupportedEncoderError, match="truncate_dim=0"):
        align(model, TEXTS, folder="never", progress=False)
    model.truncate_dim = 100  # no cut at all
    assert Encoder.of(model).dims == 32
    turned = measured("dot", tail=[Normalize()])(backbones)
    turned.truncate_dim = 16
    with pytest.raises(UnsupportedEncoderError, match="truncate_dim=16"):
        Similarity.of(turned)


# Projections


@pytest.fixture
def aligned(encoder, tmp_path):
    return align(encoder(), some_texts(60), "2x8,4x32", folder=tmp_path / "aligned", progress=False)


def test_a_loaded_model_remembers_its_projections(aligned, tmp_path):
    model, turns = load_encoder(aligned.folder).cpu(), load_projections(aligned.folder)
    wanted = normalize(encode(model, TEXTS, {2: 8}, projections=turns)[2], dim=-1)
    close(served(model, "2x8", tmp_path / "cup").encode(TEXTS), wanted)
    plain = served(model, "2x8", tmp_path / "plain", projections={}).encode(TEXTS)
    close(plain, normalize(encode(model, TEXTS, {2: 8})[2], dim=-1))
    assert np.abs(plain - np.asarray(wanted)).max() > 0.1
    sets = {"sts": {"s": scored()}}
    for own, given in ((None, turns), ({}, {})):
        found = GridEvaluator("2x8", **sets, projections=own).rows(model)
        assert found == GridEvaluator("2x8", **sets, projections=given).rows(model)
    cups = Ladder.parse("2x8")
    assert agreement(model, TEXTS, cups) == agreement(model, TEXTS, cups, projections=turns)
    assert agreement(model, TEXTS, cups) != agreement(model, TEXTS, cups, projections={})


def test_stock_code_does_not_know_them_and_is_told(aligned, tmp_path):
    model = SentenceTransformer(str(aligned.folder), device="cpu")
    with pytest.warns(UserWarning, match="whose sizes were trained with projections: they are used"):
        cup = served(model, "2x8", tmp_path / "cup")
    close(cup.encode(TEXTS), served(load_encoder(aligned.folder).cpu(), "2x8", tmp_path / "again").encode(TEXTS))


def test_a_trained_model_remembers_the_projections_it_was_trained_with(aligned, tmp_path):
    """Those that it had are where a training starts, and are forgotten for what it is trained with."""
    options = dict(steps=1, progress=False, save_strategy="no", learning_rate=1e-9)
    for name, projection, rate in (("own", "auto", 0), ("none", "none", 5e-3), ("pca", "pca", 0)):
        model = load_encoder(aligned.folder).cpu()
        trained = train(
            model, TEXTS, "2x8,4x32", folder=tmp_path / name, projection=projection, projection_rate=rate, **options
        )
        assert own_projections(model).keys() == trained.projections.keys() == (set() if name == "none" else {2})
        if name == "own":
            close(trained.projections[2].encode, aligned.projections[2].encode)
        wanted = encode(model, TEXTS, {2: 8}, projections=trained.projections)[2]
        close(served(model, "2x8", tmp_path / f"{name}-cup").encode(TEXTS), normalize(wanted, dim=-1))


def test_projections_of_another_ladder_are_not_a_start(aligned, tmp_path):
    model = load_encoder(aligned.folder).cpu()
    options = dict(steps=1, progress=False, save_strategy="no", learning_rate=1e-9, projection_rate=0)
    trained = train(model, TEXTS, "1x8,2x8,4x32", folder=tmp_path / "out", **options)
    assert trained.projections.keys() == {1, 2}
    assert (trained.projections[2].encode - aligned.projections[2].encode).abs().max() > 0.01


def test_damaged_projections_are_told_when_the_model_is_loaded(aligned):
    (aligned.folder / "projections.safetensors").unlink()
    with pytest.raises(NestlingError, match="projections.safetensors"):
        load_encoder(aligned.folder)


def test_exports_have_none_of_their_own(aligned, tmp_path):
    cup = export(load_encoder(aligned.folder).cpu(), "2x8", tmp_path / "cup").folder
    assert own_projections(load_encoder(cup)) == {}
    close(served(load_encoder(cup).cpu(), "1x4", tmp_path / "again").encode(TEXTS)[:, 0] ** 2 >= 0, True)


# Texts that are not like others


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert"])
def test_a_model_that_would_read_more_than_it_has_positions_for(backbones, tmp_path, family):
    """The model is not changed: long texts are refused with the number to set; its exports cut them."""
    model = sentence_model(backbones(family))
    model.max_seq_length = 200
    cup = served(model, "2x8", tmp_path / "cup")
    limit = cup.max_seq_length
    assert model.max_seq_length == 200 and limit in (62, 63, 64)
    long = " ".join(WORDS[:90])
    with pytest.raises(OptionError, match=rf"max_seq_length=200.*set model.max_seq_length = {limit}"):
        taps(model, model.preprocess([long]), [2])
    model.max_seq_length = limit
    close(cup.encode([long, "w9"]), normalize(encode(model, [long, "w9"], {2: 8})[2], dim=-1))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "qwen3", "t5"])
def test_odd_texts(encoder, tmp_path, family, side):
    model = encoder(family, side=side)
    cup = served(model, "2x8", tmp_path / "cup")
    texts = ["", " ", "\n\t", "w9", "日本語 🚢", "w9 " * 500, "\u200b", "W9"]
    close(cup.encode(texts), normalize(encode(model, texts, {2: 8})[2], dim=-1))
    for text in texts:  # batches of one
        close(cup.encode([text]), normalize(encode(model, [text], {2: 8})[2], dim=-1))
    assert encode(model, [], {2: 8})[2].shape == (0, 8)


def test_queries_that_are_cut_shorter(encoder, tmp_path):
    """A length of its own for queries is kept, and measured with."""
    model, texts = encoder(), ["w9 w10 w11 w12 w13 w14 w15", "w9"]
    model[0].query_length, model.prompts = 5, {"query": "w20 "}
    cup = served(model, "2x8", tmp_path / "cup")
    close(cup.encode_query(texts), normalize(encode(model, texts, {2: 8}, prompt="w20 ", task="query")[2], dim=-1))
    assert np.abs(cup.encode_query(texts) - cup.encode(texts, prompt="w20 ")).max() > 0.01
    data = searched()
    (row,) = GridEvaluator("2x8", retrieval={"r": data}).rows(model)
    (own,) = GridEvaluator("2x8", retrieval={"r": data}).rows(cup)
    assert own["ndcg_r"] == pytest.approx(row["ndcg_r"], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_half_precision_is_measured_as_it_is_and_not_exported(encoder, tmp_path, family, dtype):
    model = encoder(family).to(dtype)
    found = encode(model, TEXTS, {2: 8, 4: 32})
    assert found[4].dtype == torch.float32
    close(found[4], model.encode(TEXTS, convert_to_tensor=True).float(), 1e-3)
    assert np.isfinite(GridEvaluator("2x8", sts={"s": scored()}).rows(model)[0]["s"])
    with pytest.raises(ExportError, match=str(dtype).removeprefix("torch.")):
        export(model, "2x8", tmp_path / "cup")


def test_lower_casing_comes_along(backbones, tmp_path):
    """It is asked for in a file of sentence-transformers that exports rewrite."""
    sentence_model(backbones("bert")).save_pretrained(str(tmp_path / "model"))
    path = tmp_path / "model" / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    model = load_encoder(tmp_path / "model").cpu()
    close(model.encode(["W9 W10"]), model.encode(["w9 w10"]))
    cup = served(model, "2x8", tmp_path / "cup")
    close(cup.encode(["W9 W10"]), normalize(encode(model, ["w9 w10"], {2: 8})[2], dim=-1))


def test_modules_between_transformer_and_pooling_are_refused(encoder):
    model = encoder()
    tokens = Dense(32, 32, module_input_name="token_embeddings", module_output_name="token_embeddings")
    model = SentenceTransformer(modules=[model[0], tokens, model[1]], device="cpu")
    with pytest.raises(UnsupportedEncoderError, match="changes token vectors"):
        taps(model, model.preprocess(TEXTS), [2])


def test_a_projection_of_another_width_than_truncate_dim(encoder, tmp_path):
    model = encoder()
    model.truncate_dim = 16
    with pytest.raises(ExportError, match="projection is of width 32, the embeddings of 16"):
        export(model, "2x8", tmp_path / "cup", projections={2: Projection(torch.eye(32))})
