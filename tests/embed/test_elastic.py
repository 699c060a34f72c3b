"""One object: any size of it is the exported model's vectors, training never ends below the start, and it is saved."""

import json
import time
from threading import Thread

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nestling.embed import ElasticEncoder, GridEvaluator, Projection, TrainConfig
from nestling.embed.evaluation.agreement import agreement
from nestling.embed.ladder import Ladder
from nestling.embed.training.data import Examples
from nestling.embed.training.held_out import held_out
from nestling.errors import ExportError, FileError, LadderError, OptionError

from .families import FAMILIES, some_texts
from .sets import scored, searched
from .training.test_train import pairs

SIZES = "1x8,2x16,4x32"
TEXTS = list(dict.fromkeys(some_texts(200, seed=3)))
FAST = {"steps": 4, "batch_size": 8, "progress": False}
RUINOUS = {**FAST, "learning_rate": 3.0, "projection_rate": 10.0}


def elastic(model, sizes=SIZES) -> ElasticEncoder:
    return ElasticEncoder.from_pretrained(model, sizes)


def by_itself(one: ElasticEncoder) -> list[dict]:
    """Scored pairs that the encoder is right about: any harm that is done to it shows."""
    first, second = TEXTS[:130], TEXTS[40:170]
    scores = torch.nn.functional.cosine_similarity(*(torch.tensor(one.encode(side)) for side in (first, second)))
    columns = (first, second, scores.tolist())
    return [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in zip(*columns, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_size_is_the_exported_model(family, encoder, tmp_path):
    model = encoder(family)
    model.prompts = {"query": "w7 w8 ", "document": "w9 "}
    one = elastic(model).align(TEXTS, progress=False)
    small = one.cut("2x16")
    stock = SentenceTransformer(str(one.export("2x16", tmp_path / "size").folder), device="cpu")
    for name in (None, "query"):
        found = one.encode(TEXTS[:9], size="2x16", prompt_name=name)
        assert found.shape == (9, 16) and found.dtype == np.float32
        for served in (small, stock):
            np.testing.assert_allclose(found, served.encode(TEXTS[:9], prompt_name=name), rtol=0, atol=1e-5)
    whole = model.encode(TEXTS[:9], normalize_embeddings=True)
    np.testing.assert_allclose(one.encode(TEXTS[:9]), whole, rtol=0, atol=1e-5)


def test_several_sizes_are_read_from_one_forward(encoder, monkeypatch):
    one = elastic(encoder()).align(TEXTS, progress=False)
    calls, preprocess = [], one.model.preprocess
    monkeypatch.setattr(one.model, "preprocess", lambda *a, **k: calls.append(1) or preprocess(*a, **k))
    found = one.encode(TEXTS[:5], sizes=one.sizes)
    assert list(found) == SIZES.split(",") and len(calls) == 1
    for size, vectors in found.items():
        np.testing.assert_allclose(vectors, one.encode(TEXTS[:5], size), rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.encode(TEXTS[0], "1x8"), found["1x8"][0], rtol=0, atol=1e-6)
    assert one.encode(TEXTS[:5], "2x7", convert_to_tensor=True).shape == (5, 7)


def test_sizes_that_cannot_be_read(encoder):
    one = elastic(encoder()).align(TEXTS, progress=False)
    with pytest.raises(LadderError, match="deeper than the model"):
        one.encode(TEXTS, "5x8")
    with pytest.raises(ExportError, match="no projection for 3x8, only for layers"):
        one.encode(TEXTS, "3x8")
    with pytest.raises(OptionError, match="give one of the two"):
        one.encode(TEXTS, "1x8", sizes=["2x16"])
    with pytest.raises(OptionError, match="prompt_name='poem'"):
        one.encode(TEXTS, "1x8", prompt_name="poem")
    plain = elastic(encoder())
    assert plain.encode(TEXTS[:2], "3x8").shape == (2, 8)  # cut as it is: any depth will do


def test_threads_encode_at_different_sizes(encoder):
    one = elastic(encoder()).align(TEXTS, progress=False)
    wanted, found = one.encode(TEXTS, sizes=SIZES.split(",")), {}
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}

    def encode(size):
        for _ in range(3):
            found[size] = one.encode(TEXTS, size)

    threads = [Thread(target=encode, args=(size,)) for size in wanted]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for size, vectors in wanted.items():
        np.testing.assert_allclose(found[size], vectors, rtol=0, atol=1e-6)
    assert len(list(one.model[0].model.encoder.layer)) == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())


def test_a_folder_is_one_object(encoder, tmp_path):
    one = elastic(encoder("modernbert")).align(TEXTS, progress=False)
    one.save_pretrained(tmp_path / "out")
    again = ElasticEncoder.from_pretrained(tmp_path / "out")
    assert again.sizes == one.sizes and again.info["alignment"]["texts"] == len(TEXTS)
    for size in SIZES.split(","):
        np.testing.assert_allclose(again.encode(TEXTS, size), one.encode(TEXTS, size), rtol=0, atol=1e-6)
    assert {"nestling.json", "projections.safetensors", "modules.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    with pytest.raises(FileError, match="exists"):
        one.save_pretrained(tmp_path / "out")
    other = ElasticEncoder.from_pretrained(tmp_path / "out", "3x8,4x32")  # to be aligned anew
    with pytest.raises(ExportError, match="no projection for 3x8"):
        other.agreement(TEXTS[:40])
    assert other.align(TEXTS, progress=False).agreement(TEXTS[:40])[0]["agreement"] > 0.3


def test_a_folder_of_an_earlier_release_is_read(encoder, tmp_path):
    one = elastic(encoder()).align(TEXTS, progress=False)
    folder = tmp_path / "out"
    one.save_pretrained(folder)
    (folder / "projections.safetensors").rename(folder / "rotations.safetensors")
    said = json.loads((folder / "nestling.json").read_text())
    del said["projections"]
    said |= {"rotations": "rotations.safetensors"}
    said["sha256"]["rotations.safetensors"] = said["sha256"].pop("projections.safetensors")
    (folder / "nestling.json").write_text(json.dumps(said))
    again = ElasticEncoder.from_pretrained(folder)
    np.testing.assert_allclose(again.encode(TEXTS, "1x8"), one.encode(TEXTS, "1x8"), rtol=0, atol=1e-6)


def test_a_save_without_alignment(encoder, tmp_path):
    elastic(encoder()).save_pretrained(tmp_path / "out")
    again = ElasticEncoder.from_pretrained(tmp_path / "out")
    assert str(again.sizes) == SIZES and not again.projections and not again.info
    assert "cut out of it by nestling as they are" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_a_ruinous_training_gives_the_start_back(encoder, kind, tmp_path):
    """Bit for bit: the weights, and the projections of the alignment."""
    one = elastic(encoder()).align(TEXTS, progress=False)
    data = {"pairs": pairs(130), "scored": by_itself(one)}[kind]
    weights = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    start = {depth: turn.encode.clone() for depth, turn in one.projections.items()}
    one.train(data, TrainConfig(**RUINOUS, output_dir=tmp_path / "out"))
    info = one.info["training"]
    assert info["kept"] == "start" and info["best_step"] == 0
    assert info["best"] == max(point["mean"] for point in info["curve"] if "mean" in point)
    assert all(torch.equal(weights[name], tensor) for name, tensor in one.model.state_dict().items())
    assert all(torch.equal(turn.encode, start[depth]) for depth, turn in one.projections.items())
    saved = ElasticEncoder.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(saved.encode(TEXTS, "1x8"), one.encode(TEXTS, "1x8"), rtol=0, atol=1e-6)
    assert saved.info["training"]["kept"] == "start"


def test_a_good_training_is_kept(encoder):
    """With no folder named nothing is written; what is measured is better than the alignment."""
    one = elastic(encoder())
    one.train(pairs(130), TrainConfig(**{**FAST, "steps": 40, "batch_size": 32, "learning_rate": 3e-4}))
    info = one.info["training"]
    means = {point["step"]: point["mean"] for point in info["curve"] if "mean" in point}
    assert info["kept"] == "best" and info["best"] > means[0] and means[info["best_step"]] == info["best"]
    assert info["rows"] == 117 and "1x8_mean_ndcg" in info["curve"][-1]


def test_the_users_own_evaluator_decides(encoder):
    one = elastic(encoder()).align(TEXTS, progress=False)
    measure = GridEvaluator(sts={"dev": by_itself(one)})
    before = ElasticEncoder(one.model, one.sizes, one.projections).evaluate(evaluator=measure)
    one.train(pairs(130), TrainConfig(**RUINOUS), evaluator=measure)
    assert one.info["training"]["kept"] == "start" and one.info["training"]["rows"] == 130
    assert one.evaluate(evaluator=measure) == before


def test_what_is_held_out_is_not_trained_on():
    for data in (TEXTS, pairs(130), scored(130)):
        examples = Examples.of(data)
        rest, kept = held_out(examples, 500)
        rows, some, others = (list(zip(*part.columns.values(), strict=True)) for part in (examples, rest, kept))
        assert len(others) == len(rows) // 10 and sorted(some + others) == sorted(rows)
        assert held_out(examples, 0) == (examples, None)
    few = Examples.of(TEXTS[:60])
    assert held_out(few, 500) == (few, None)


def test_choosing_by_what_was_measured(encoder):
    one = elastic(encoder())
    rows = [{"size": size, "mean_sts": value} for size, value in (("1x8", 0.6), ("2x16", 0.79), ("4x32", 0.8))]
    assert one.choose(quality=0.97, rows=rows) == "2x16" and one.choose(quality=0.7, rows=rows) == "1x8"
    assert one.choose(bytes=64, rows=rows) == "2x16" and one.choose(bytes=4 * 32) == "4x32"
    assert one.choose(quality=0.7, bytes=32, rows=rows) == "1x8"
    worse = [*rows[:2], {"size": "4x32", "mean_sts": 0.5}]
    assert one.choose(bytes=1000, rows=worse) == "2x16"
    with pytest.raises(OptionError, match="has 97.0% of the full one's quality, the nearest is 1x8 with 75.0%"):
        one.choose(quality=0.97, bytes=32, rows=rows)
    with pytest.raises(OptionError, match="no size of .* is small.*the smallest vector is that of 1x8, 32 bytes"):
        one.choose(bytes=8)
    with pytest.raises(OptionError, match="do not have the full size 4x32"):
        one.choose(quality=0.9, rows=rows[:2])
    with pytest.raises(OptionError, match="nothing was measured yet"):
        one.choose(quality=0.9)
    with pytest.raises(OptionError, match="expected quality"):
        one.choose()
    one.agreement(TEXTS[:40])
    assert one.choose(quality=1.0) == "4x32"


def test_choosing_by_speed(encoder, monkeypatch):
    """The deepest size that is quick enough: each layer here takes two milliseconds more."""
    one = elastic(encoder())
    monkeypatch.setattr(one, "encode", lambda texts, size: time.sleep(0.002 * size[0] * len(texts)))
    assert one.choose(texts_per_second=180, texts=["w5"] * 10) == "2x16"
    with pytest.raises(OptionError, match="the quickest is 1x8 with .* texts a second: ask for less"):
        one.choose(texts_per_second=100_000, texts=["w5"] * 10)
    with pytest.raises(OptionError, match="give texts"):
        one.choose(texts_per_second=10)


def test_measuring(encoder):
    one = elastic(encoder()).align(TEXTS, progress=False)
    rows = one.evaluate(sts={"dev": scored()}, retrieval={"made": searched()}, method="aligned")
    expected = GridEvaluator(SIZES, sts={"dev": scored()}, retrieval={"made": searched()}, projections=one.projections)
    assert rows == expected.rows(one.model, model_name=rows[0]["model"], method="aligned") and one.rows == rows
    found = one.agreement(TEXTS[:40])
    assert found == agreement(one.model, TEXTS[:40], Ladder.parse(SIZES), projections=one.projections)
    assert torch.is_tensor(one.similarity(one.encode(TEXTS[:2], "1x8"), one.encode(TEXTS[:3], "1x8")))


def test_pushing(encoder, monkeypatch):
    seen = {}

    class Hub:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, name, private, exist_ok):
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = {path.name for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    one = elastic(encoder()).align(TEXTS, progress=False)
    assert one.push_to_hub("user/elastic", token="t") == "hub/user/elastic"
    assert {"nestling.json", "projections.safetensors", "README.md"} <= seen["files"]
    monkeypatch.setattr(Hub, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(FileError, match="user/elastic cannot be written to"):
        one.push_to_hub("user/elastic")


def test_the_papers_training(encoder):
    """Vectors as they come, and all sizes count alike."""
    config = TrainConfig.paper(**FAST, held_out=0)
    one = elastic(encoder())
    one.train(pairs(), config)
    assert one.projections == {} and one.info["training"]["projection"] is None
    assert one.info["training"]["weights"] == {"full": 1.0} and one.info["training"]["kept"] == "last"


def test_configs_refuse():
    for options in ({"steps": 0}, {"learning_rate": -1}, {"projection": "random"}, {"weights": 3}, {"warmup": 1},
                    {"weights": {"1x8": 0}}, {"prompts": 5}, {"arguments": ["x"]}, {"held_out": -1},
                    {"weights": ["1x8"]}, {"prompts": ["anchor"]}, {"bf16": 1}):  # fmt: skip
        with pytest.raises(OptionError, match=next(iter(options))):
            TrainConfig(**options)
    with pytest.raises(OptionError, match="both say how long"):
        TrainConfig(steps=3, epochs=1)
    assert TrainConfig(weights=["1x8=2"], prompts=["a=x: "]).weights == {"1x8": 2.0}
    assert Projection(torch.eye(2)).keeps_similarities
