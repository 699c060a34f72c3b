"""Small sizes are trained by texts alone: the full one keeps every bit, and a training goes on to the same result."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nestling.embed import ElasticEncoder, GridEvaluator, TrainConfig
from nestling.embed.training import distil as module
from nestling.embed.training.distil import order
from nestling.embed.training.follower import coordinates
from nestling.errors import ExampleError, LadderError, OptionError, TrainingError, UnsupportedEncoderError

from ..families import FAMILIES, sentence_model, some_texts
from ..sets import scored

SIZES = "1x8,2x16,4x32"
TEXTS = list(dict.fromkeys(some_texts(260, seed=3)))
FAST = {"steps": 4, "batch_size": 8, "rank": 4, "progress": False, "bf16": False}


def trained(model, folder=None, sizes=SIZES, data=TEXTS, teacher=None, evaluator=None, **options) -> ElasticEncoder:
    config = TrainConfig(output_dir=folder, **{**FAST, **options})
    one = ElasticEncoder.from_pretrained(model, sizes)
    return one.train(data, config, teacher=teacher, evaluator=evaluator)


def equal(one: ElasticEncoder, other: ElasticEncoder) -> None:
    assert one.adapter.space == other.adapter.space and one.adapter.changes.keys() == other.adapter.changes.keys()
    for name, factors in one.adapter.changes.items():
        assert all(map(torch.equal, factors, other.adapter.changes[name])), name
    for depth, turn in one.adapter.projections.items():
        assert torch.equal(turn.encode, other.adapter.projections[depth].encode), depth


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_size_keeps_every_bit_and_small_ones_are_exported(family, encoder, tmp_path):
    model = encoder(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = model.encode(TEXTS[:20], normalize_embeddings=True)
    one = trained(model, held_out=0)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    np.testing.assert_array_equal(model.encode(TEXTS[:20], normalize_embeddings=True), vectors)
    before = ElasticEncoder(encoder(family), SIZES).encode(TEXTS[:9])
    np.testing.assert_array_equal(one.encode(TEXTS[:9]), before)
    stock = SentenceTransformer(str(one.export("2x16", tmp_path / "size").folder), device="cpu")
    wanted = one.encode(TEXTS[:9], "2x16")
    for served in (one.cut("2x16"), stock):
        np.testing.assert_allclose(served.encode(TEXTS[:9]), wanted, rtol=0, atol=5e-6)
    assert json.loads((tmp_path / "size" / "nestling.json").read_text())["space"] == one.space
    whole = one.cut("4x32")
    np.testing.assert_allclose(whole.encode(TEXTS[:9]), before, rtol=0, atol=1e-6)


def test_small_sizes_agree_better_and_can_search_each_other(encoder):
    aligned = trained(encoder(), steps=1, held_out=0, learning_rate=1e-9, projection_rate=0)
    one = trained(encoder(), steps=150, batch_size=32, held_out=0, learning_rate=5e-3)
    before, after = (each.agreement(TEXTS[:80]) for each in (aligned, one))
    assert all(b["agreement"] > a["agreement"] + 0.01 for a, b in zip(before[:2], after[:2], strict=True))
    losses = [point["loss"] for point in one.info["training"]["curve"]]
    assert losses[-1] < losses[0] and len(losses) == 10
    queries, documents = one.encode_query(TEXTS[:80]), one.encode_document(TEXTS[:80], "2x32")
    scores = torch.tensor(queries @ documents.T)
    assert (scores.argmax(-1) == torch.arange(80)).float().mean() > 0.8  # itself, by another size
    narrow = one.encode(TEXTS[:80], "4x16")  # a prefix of the full size is in the space too
    found = queries[:, :16] / np.linalg.norm(queries[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(found, narrow, rtol=0, atol=1e-5)
    plain = one.encode(TEXTS[:80])
    np.testing.assert_allclose(queries @ queries.T, plain @ plain.T, rtol=0, atol=1e-5)


def test_a_stopped_training_goes_on_to_the_same_result(encoder, tmp_path, monkeypatch):
    options = {"steps": 30, "held_out": 30}
    expected = trained(encoder(), tmp_path / "whole", **options)
    losses, calls = module.Follower.losses, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return losses(self, *args)

    monkeypatch.setattr(module.Follower, "losses", failing)
    with pytest.raises(KeyboardInterrupt):
        trained(encoder(), tmp_path / "part", **options)
    monkeypatch.undo()
    assert not (tmp_path / "part").exists()
    found = trained(encoder(), tmp_path / "part", resume=True, **options)
    equal(expected, found)
    curve = found.info["training"]["curve"]
    assert curve == expected.info["training"]["curve"] and [point["step"] for point in curve] == [*range(0, 31, 3)]
    again = trained(encoder(), tmp_path / "part", resume=True, **options)  # it has ended
    equal(found, again)
    with pytest.raises(TrainingError, match=r"holds another training \(.*rank: 4, now 5"):
        trained(encoder(), tmp_path / "part", resume=True, **options, rank=5)
    path = tmp_path / "part-checkpoints" / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TrainingError, match="state.safetensors is damaged"):
        trained(encoder(), tmp_path / "part", resume=True, **options)


def test_it_is_saved_with_its_encoder(encoder, tmp_path):
    one = trained(encoder(), tmp_path / "out", held_out=30)
    info = one.info["training"]
    assert info["kept"] in ("best", "start") and info["rows"] == len(TEXTS) - len(TEXTS) // 10
    read = ElasticEncoder.from_pretrained(tmp_path / "out")
    equal(one, read)
    assert str(read.sizes) == SIZES and read.info["training"]["steps"] == 4
    for size in ("1x8", "2x16", "4x32", "4x16"):
        np.testing.assert_array_equal(read.encode(TEXTS[:9], size), one.encode(TEXTS[:9], size))
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    np.testing.assert_array_equal(stock.encode(TEXTS[:9]), encoder().encode(TEXTS[:9]))
    assert "4 steps of 8" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    with pytest.raises(TrainingError, match="out exists"):
        trained(encoder(), tmp_path / "out")


def test_it_never_ends_below_its_start(encoder):
    one = trained(encoder(), held_out=30, learning_rate=3.0, projection_rate=10.0)
    assert one.info["training"]["kept"] == "start" and one.info["training"]["best_step"] == 0
    assert all(not up.any() for _, up in one.adapter.changes.values())
    measure = GridEvaluator(sts={"dev": scored()})
    one = trained(encoder(), evaluator=measure, learning_rate=3.0)
    assert one.info["training"]["rows"] == len(TEXTS) and "1x8_mean_sts" in one.info["training"]["curve"][0]


def test_another_teacher_of_another_width(encoder, backbones):
    wide = sentence_model(backbones("distilbert"))
    wide.truncate_dim = 20
    for teacher in (wide, encoder("roberta")):
        one = trained(encoder(), teacher=teacher, held_out=30)
        assert one.encode(TEXTS[:3], "2x16").shape == (3, 16) and sorted(one.projections) == [1, 2]
        assert one.info["training"]["teacher"] is True
        np.testing.assert_array_equal(one.encode(TEXTS[:3]), ElasticEncoder(encoder(), SIZES).encode(TEXTS[:3]))
        with pytest.raises(Exception, match="follows another teacher"):
            one.encode_query(TEXTS[:3])


def test_minutes_and_texts(encoder, tmp_path):
    one = trained(encoder(), tmp_path / "out", steps=None, epochs=500, minutes=0.02, texts=100, held_out=0)
    info = one.info["training"]
    assert info["rows"] == 100 and 1 <= info["steps"] < 6250
    excluded = trained(encoder(), exclude=TEXTS[:60], held_out=0)
    assert excluded.info["training"]["rows"] == len(TEXTS) - 60


@pytest.mark.parametrize(
    "data, options, error, message",
    [
        ([], {}, ExampleError, "got none"),
        (["w9 w8"], {}, ExampleError, "all texts are the same"),
        (iter(()), {}, ExampleError, "got none"),
        (TEXTS, {"sizes": "1x8,5x32"}, LadderError, "5x32 is deeper than the model"),
        (TEXTS, {"sizes": "4x8,4x32"}, OptionError, "of the full depth alone"),
        (TEXTS, {"batch_size": 500}, ExampleError, "batch_size=500 does not fit"),
        (TEXTS, {"cascade": True}, OptionError, "cascade: that is of training on pairs"),
        (TEXTS, {"dropout": True}, OptionError, "dropout: that is of training on pairs"),
        (TEXTS, {"weights": {"4x32": 2.0}}, OptionError, "weights: 4x32 is none of the small sizes"),
        (TEXTS, {"evaluator": len}, OptionError, "it measures the full model"),
        (TEXTS, {"teacher": 5}, OptionError, "teacher=5"),
        (TEXTS, {"exclude": TEXTS}, ExampleError, "0 of .* texts are left"),
        (TEXTS, {"resume": True}, OptionError, "resume=True without output_dir"),
        (TEXTS, {"prompts": {"anchor": "x"}}, OptionError, "no columns"),
    ],
)
def test_bad_input_leaves_nothing(encoder, tmp_path, data, options, error, message):
    folder = None if "resume" in options else tmp_path / "out"
    with pytest.raises(error, match=message):
        trained(encoder(), folder, data=data, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_of_dot_products(encoder):
    model = encoder()
    model.similarity_fn_name = "dot"
    with pytest.raises(UnsupportedEncoderError, match="in which lengths count"):
        trained(model)


def test_broken_weights_stop_it(encoder):
    model = encoder()
    model[0].model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(Exception, match="not finite"):
        trained(model)


def test_the_order_of_batches():
    lengths = torch.randint(1, 50, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = order(lengths, 8, 100, seed=1)
    assert rows == order(lengths, 8, 100, seed=1) != order(lengths, 8, 100, seed=2)
    assert len(rows) == 800 and sorted(rows[:300]) != list(range(300)) and set(rows) == set(range(300))
    spreads = [np.ptp([lengths[row] for row in rows[i : i + 8]]) for i in range(0, 512, 8)]
    assert np.median(spreads) < 5  # texts of like length


def test_principal_coordinates():
    vectors = torch.nn.functional.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    basis = coordinates(vectors, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=0, atol=1e-5)
    energy = (vectors @ basis).square().mean(0)
    assert (energy.diff() <= 1e-6).all()
    assert coordinates(vectors, 4).shape == (6, 4) and coordinates(vectors, 9)[:, 6:].abs().max() == 0
