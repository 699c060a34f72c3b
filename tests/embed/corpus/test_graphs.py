"""Vectors of a corpus by ONNX Runtime: torch's, for every family, with every engine; what goes wrong is said."""

import numpy as np
import pytest
import torch

from nestling.embed import ElasticEncoder, EncodeConfig, EncodeError, TrainConfig, Vectors, encode_corpus
from nestling.embed.corpus import encode as room
from nestling.embed.corpus import graphs
from nestling.embed.export import tracing
from nestling.embed.model.parts import Encoder
from nestling.errors import ExportError

from ..families import FAMILIES, sentence_model, some_texts

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZES = ("1x8", "2x16", "4x12", "4x32")
ROWS = [{"id": f"d{number}", "text": text} for number, text in enumerate(some_texts(23))]


def read_by_both(encoder, folder, sizes=SIZES, int8=False, texts=None):
    """Vectors by the graphs and by torch, at every size."""
    texts = some_texts(17, seed=5) if texts is None else texts
    graphs.write_graphs(encoder, sizes, folder, int8)
    found = graphs.GraphEncoder(encoder, sizes, folder).encode_document(texts, sizes=sizes, batch_size=4)
    return found, encoder.encode_document(texts, sizes=sizes, batch_size=4)


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "bert")]
)
def test_all_sizes_of_one_graph_are_those_of_torch(backbones, tmp_path, family):
    encoder = ElasticEncoder.from_pretrained(sentence_model(backbones(family)))
    encoder.align(some_texts(60), progress=False)
    encoder.model.prompts["document"] = "w7 w9 "
    found, wanted = read_by_both(encoder, tmp_path)
    assert list(found) == list(SIZES) and [path.name for path in tmp_path.iterdir()] == ["0.onnx"]
    for size in SIZES:
        assert found[size].dtype == np.float32 and np.abs(found[size] - wanted[size]).max() < 1e-5


def test_sizes_of_an_adapter_have_a_graph_beside_the_full_ones(backbones, tmp_path):
    encoder = ElasticEncoder.from_pretrained(sentence_model(backbones("bert")), "1x8,2x16,4x32")
    encoder.train(some_texts(60), TrainConfig(steps=2, batch_size=8, progress=False))
    assert encoder.adapter is not None
    sizes = ("1x8", "2x16", "4x32")
    found, wanted = read_by_both(encoder, tmp_path, sizes)
    assert len(list(tmp_path.iterdir())) == 2
    for size in sizes:
        assert np.abs(found[size] - wanted[size]).max() < 1e-5


def test_lengths_that_count_are_kept(backbones, tmp_path):
    encoder = ElasticEncoder.from_pretrained(sentence_model(backbones("bert"), "max"))
    encoder.model.similarity_fn_name = "dot"
    found, wanted = read_by_both(encoder, tmp_path)
    assert np.linalg.norm(wanted["4x32"], axis=1).max() > 1.1
    assert np.abs(found["4x32"] - wanted["4x32"]).max() < 1e-5 * np.abs(wanted["4x32"]).max()


def test_int8_is_close(backbones, tmp_path):
    encoder = ElasticEncoder.from_pretrained(sentence_model(backbones("bert")))
    found, wanted = read_by_both(encoder, tmp_path, int8=True)
    assert [path.name for path in tmp_path.iterdir()] == ["0.onnx"]
    for size in SIZES:
        cosines = (found[size] * wanted[size]).sum(1)
        assert cosines.mean() > 0.97 and not np.allclose(found[size], wanted[size], atol=1e-5)


@pytest.fixture(scope="module")
def model(backbones, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "model"
    sentence_model(backbones("bert")).save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def config(backend="onnx", **options) -> EncodeConfig:
    return EncodeConfig(shard_rows=8, batch_size=4, format="npy", backend=backend, **options)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bytes_and_leaves_no_graph(model, tmp_path, monkeypatch):
    whole = encode_corpus(model, ROWS, tmp_path / "whole", config(), sizes="1x8,4x32")
    assert whole.job["backend"] == "onnx"
    torches = encode_corpus(model, ROWS, tmp_path / "torch", config("torch"), sizes="1x8,4x32")
    assert np.abs(whole.read("4x32") - torches.read("4x32")).max() < 0.001  # fp16
    assert whole.spaces == torches.spaces

    def stopping(job, works, encoder, config, real=room._shards):
        for shard in real(job, works, encoder, config):
            assert len(list(job.graphs.iterdir())) == 1
            yield shard
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "_shards", stopping)
        encode_corpus(model, ROWS, tmp_path / "killed", config(), sizes="1x8,4x32")
    encode_corpus(model, ROWS, tmp_path / "killed", config(), sizes="1x8,4x32")
    bytes_of = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert bytes_of == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    monkeypatch.setattr(room, "write_graphs", None)  # none is needed where all shards are there
    assert encode_corpus(model, ROWS, tmp_path / "whole", config(), sizes="1x8,4x32") == whole


@pytest.mark.slow
def test_processes_read_the_same_graphs(model, tmp_path):
    found = encode_corpus(model, ROWS, tmp_path / "vectors", config(engine="processes", workers=2), sizes="2x16,4x32")
    wanted = encode_corpus(model, ROWS, tmp_path / "local", config(), sizes="2x16,4x32")
    for size in found.sizes:
        assert np.abs(found.read(size) - wanted.read(size)).max() < 0.001
    assert {path.name for path in (tmp_path / "vectors").iterdir()} == {p.name for p in (tmp_path / "local").iterdir()}


def test_the_backend_is_part_of_the_job(model, tmp_path):
    encode_corpus(model, ROWS, tmp_path / "vectors", config("torch"), sizes="4x32")
    with pytest.raises(EncodeError, match=r"another job \(backend differ\)"):
        encode_corpus(model, ROWS, tmp_path / "vectors", config(), sizes="4x32")
    assert Vectors.open(tmp_path / "vectors").job["backend"] == "torch"


def test_what_cannot_be_is_said_and_leaves_no_graph(model, backbones, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ExportError, match=r"onnxruntine: pip install 'nestling\[onnx"):
        patch.setattr(tracing, "PACKAGES", ("onnx", "onnxruntine"))
        encode_corpus(model, ROWS, tmp_path / "none", config(), sizes="4x32")
    assert not (tmp_path / "none").exists()
    graphs.write_graphs(ElasticEncoder.from_pretrained(model, "4x32"), ("4x32",), tmp_path, int8=False)
    graph = (tmp_path / "0.onnx").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_write", lambda model, projections, sizes, path, int8: path.write_bytes(graph))
        patch.setattr(graphs, "TOLERANCE", 0.0)
        patch.setattr(graphs, "CLOSE", 1.1)
        with pytest.raises(ExportError, match="of 4x32 differ by .*take the backend torch"):
            encode_corpus(model, ROWS, tmp_path / "far", config(), sizes="4x32")
        with pytest.raises(ExportError, match="cosine of 4x32 .* take the backend onnx"):
            encode_corpus(model, ROWS, tmp_path / "far8", config("onnx-int8"), sizes="4x32")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["vectors.json"]
    half = ElasticEncoder.from_pretrained(sentence_model(backbones("bert")).to(torch.bfloat16))
    with pytest.raises(ExportError, match="weights are bfloat16"):
        encode_corpus(half, ROWS, tmp_path / "half", config(), sizes="4x32")
    masked = ElasticEncoder.from_pretrained(sentence_model(backbones("bert")))
    Encoder.of(masked.model).head[0].include_prompt = False
    masked.model.prompts["document"] = "w7 "
    with pytest.raises(ExportError, match="leaves prompts such as 'w7 ' out"):
        encode_corpus(masked, ROWS, tmp_path / "masked", config(), sizes="4x32")
