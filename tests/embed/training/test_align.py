"""Aligned folders: projections in closed form beside an unchanged model, which exports and measurements take."""

import json
import sys

import pytest
import torch

from nestling import embed
from nestling.embed.evaluation.agreement import agreement
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import encode
from nestling.embed.model.folder import load_ladder, load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import fit_projections
from nestling.errors import FileError, LadderError, LoadError, TrainingError

from ..families import HIDDEN, some_texts
from ..ways import align, train

TEXTS = list(dict.fromkeys(some_texts(300, seed=3)))
CUPS = "1x8,2x16,4x32"
LADDER = Ladder.parse(CUPS)


def test_the_folder_is_the_model_with_projections(encoder, tmp_path):
    model = encoder("modernbert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = align(model, iter(TEXTS), CUPS, folder=tmp_path / "out", progress=False)
    assert str(found.ladder) == CUPS and found.info["texts"] == len(TEXTS)
    expected = fit_projections(model, TEXTS, [1, 2])
    read = load_projections(tmp_path / "out")
    assert list(read) == list(found.projections) == [1, 2]
    for depth, projection in read.items():
        torch.testing.assert_close(projection.encode, expected[depth].encode, rtol=0, atol=0)
        torch.testing.assert_close(projection.mean, expected[depth].mean, rtol=0, atol=0)
    again = load_encoder(tmp_path / "out")
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "nestling.json").read_text())["alignment"]["texts"] == len(TEXTS)


def test_cups_agree_more_than_cut_ones_and_the_full_one_stays(encoder, tmp_path):
    model, new = encoder("bert"), list(dict.fromkeys(some_texts(120, seed=11)))
    found = align(model, TEXTS, CUPS, folder=tmp_path / "out", progress=False)
    plain, aligned = agreement(model, new, LADDER), agreement(model, new, LADDER, projections=found.projections)
    assert aligned[-1] == plain[-1]
    assert all(a["agreement"] > p["agreement"] + 0.05 for a, p in zip(aligned[:-1], plain[:-1], strict=True))


def test_exports_are_its_cups(encoder, tmp_path):
    model = encoder("bert")
    align(model, TEXTS, CUPS, folder=tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No weights were trained" in card and "ElasticEncoder.from_pretrained(" in card
    folder = tmp_path / "out"
    options = {"ladder": load_ladder(folder), "projections": load_projections(folder)}
    made = export(load_encoder(folder), "2x16", tmp_path / "small", **options)
    assert made.difference < 1e-5
    small = load_encoder(tmp_path / "small")
    served = torch.tensor(small.encode(TEXTS[:9]))
    own = encode(model, TEXTS[:9], {2: 16}, projections=options["projections"])[2]
    torch.testing.assert_close(served, torch.nn.functional.normalize(own, dim=-1), rtol=0, atol=1e-5)


def test_some_texts_from_all_over_with_their_prompt(encoder, tmp_path, monkeypatch):
    seen, module = [], sys.modules["nestling.embed.training.align"]  # the package has the function under that name
    monkeypatch.setattr(module, "SAMPLE", 100)
    monkeypatch.setattr(module, "fit_projections", lambda model, texts, *a, **k: seen.extend(texts) or {})
    model = encoder("bert")
    model.prompts, model.default_prompt_name = {"query": "w7 "}, "query"
    info = align(model, TEXTS, CUPS, folder=tmp_path / "out", progress=False).info
    assert info["prompt"] == "w7 " and seen == ["w7 " + text for text in TEXTS[::3]] and len(seen) <= 100
    align(model, TEXTS, CUPS, folder=tmp_path / "none", prompt="", progress=False)
    assert seen[-1] == TEXTS[::3][-1]


def test_narrow_cups_of_the_full_depth(encoder, tmp_path):
    """They share a centred basis with the full cup, and the card says that it has to be exported too."""
    align(encoder("bert"), TEXTS, "2x16,4x8,4x32", folder=tmp_path / "out", progress=False)
    assert list(load_projections(tmp_path / "out")) == [2, 4]
    assert "the full size 4x32 has to be exported too" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "texts, cups, error, message",
    [
        ([], CUPS, embed.ExampleError, "got none"),
        (["w5 w6", " "], CUPS, embed.ExampleError, "blank|empty"),
        (["w5"] * 20, CUPS, embed.ExampleError, "all texts are the same"),
        ("w5 w6", CUPS, embed.ExampleError, "expected a list of texts"),
        (
            [{"anchor": "w5", "positive": "w6"}, {"anchor": "w7", "positive": "w8"}],
            CUPS,
            embed.ExampleError,
            "without labels",
        ),
        (TEXTS, "1x8", embed.LadderError, "full size 4x32 is missing"),
        (TEXTS, "5x8,4x32", embed.LadderError, "deeper than the model"),
        (TEXTS, f"4x{HIDDEN}", ValueError, "full model alone"),
    ],
)
def test_bad_input_leaves_nothing(encoder, tmp_path, texts, cups, error, message):
    with pytest.raises(error, match=message):
        align(encoder("bert"), texts, cups, folder=tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(encoder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileError, match="out exists: choose another folder"):
        align(encoder("bert"), TEXTS, CUPS, folder=tmp_path / "out", progress=False)


def test_broken_weights_are_named(encoder, tmp_path):
    model = encoder("bert")
    with torch.no_grad():
        model[0].model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(embed.EvaluationError, match="layer 2 is not finite"):
        align(model, TEXTS, CUPS, folder=tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "projections.safetensors"])
def test_a_bit_that_changed_is_told(encoder, tmp_path, name):
    """Numbers that are a little wrong load without an error: the checksum of ``nestling.json`` tells."""
    align(encoder("bert"), TEXTS, CUPS, folder=tmp_path / "out", progress=False)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises((LoadError, LadderError), match=f"{name} is not what was saved"):
        load_encoder(tmp_path / "out")
        load_projections(tmp_path / "out")
    ladder = json.loads((tmp_path / "out" / "nestling.json").read_text())
    assert set(ladder.pop("sha256")) == {"model.safetensors", "projections.safetensors"}
    (tmp_path / "out" / "nestling.json").write_text(json.dumps(ladder))  # as older releases wrote it
    load_encoder(tmp_path / "out")
    assert list(load_projections(tmp_path / "out")) == [1, 2]


def test_a_resumed_training_takes_no_foreign_folder(encoder, tmp_path):
    """Also one with files of other names: it is somebody's, and the training's own result is told by its ladder."""
    for name, text in (("mine", "x"), ("nestling.json", '{"cups": [{"layers": 1, "dims": 8}], "pretraining": {}}')):
        folder = tmp_path / name[:4]
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(TrainingError, match="is not the result of a training"):
            train(encoder("bert"), TEXTS, CUPS, folder=folder, resume=True, progress=False)
        assert [path.name for path in folder.iterdir()] == [name]
    assert len(list(tmp_path.iterdir())) == 2
