"""Trainings of all kinds that go on from the last whole checkpoint: to the very result of one that never stopped."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nestling import kv
from nestling.embed.model.loading import load_encoder
from nestling.embed.pretraining.pretrain import pretrain
from nestling.errors import TrainingError
from tests.embed.ways import train

from ..embed.families import save_backbone, sentence_model, some_texts
from ..embed.pretraining.test_pretrain import config as pretrain_config
from ..kv.families import BASE, tiny_fit, tiny_model

QUICK = dict(steps=6, save_steps=2, save_total_limit=9, batch_size=4, progress=False, use_cpu=True)
TEXTS = list(dict.fromkeys(some_texts(24, longest=9)))


@dataclass
class Kind:
    """A kind of training: ``run(folder, resume)`` gives what it trained; its checkpoints are in ``folder``."""

    folder: Path
    run: Callable[[Path, bool], list[torch.Tensor]]
    result: list[torch.Tensor]


@pytest.fixture(scope="module", params=["kv.train", "embed.train", "embed.pretrain"])
def kind(request, tmp_path_factory) -> Kind:
    """A training that has ended, of which only checkpoints are left, those of steps 2 and 4."""
    place = tmp_path_factory.mktemp("kind")
    if request.param != "kv.train":
        save_backbone("bert", place / "bert")
    run = {"kv.train": of_kv, "embed.train": of_embed, "embed.pretrain": of_pretrain}[request.param]
    result = run(place / "out", False)
    folder = place / ("out" if request.param == "kv.train" else "out-checkpoints")
    shutil.rmtree(folder / "checkpoint-6")
    return Kind(folder, run, result)


def of_kv(folder: Path, resume: bool) -> list[torch.Tensor]:
    ids = torch.randint(3, BASE["vocab_size"], (8, 32), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama-gqa")
    start = tiny_fit(model, ids, length=32, sinks=2, window=4, sensitivity_windows=2)
    config = kv.TrainConfig(
        tokens=6 * 4 * 32, length=32, batch_size=4, sinks=2, window=4, budgets=[0.75], output_dir=folder,
        resume=resume, arguments={"save_steps": 2, "save_total_limit": 9}, progress=False,
    )  # fmt: skip
    trained = kv.train(model, None, ids, start, config)
    return list(trained.encode.values())


def of_embed(folder: Path, resume: bool) -> list[torch.Tensor]:
    model = sentence_model(folder.parent / "bert")
    teacher = sentence_model(folder.parent / "bert", "cls")
    rows = [{"anchor": text, "positive": f"{text} w9"} for text in TEXTS]
    found = train(model, rows, "1x8,4x32", folder=folder, teacher=teacher, resume=resume, dropout=True, **QUICK)
    return [*model.state_dict().values(), *(turn.encode for turn in found.projections.values())]


def of_pretrain(folder: Path, resume: bool) -> list[torch.Tensor]:
    model = sentence_model(folder.parent / "bert")
    pretrain(model, TEXTS, "1x8,4x32", pretrain_config(output_dir=folder, resume=resume, **QUICK))
    return list(model.state_dict().values())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turned(path: Path) -> None:
    """One bit, which only a checksum can tell."""
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 4
    path.write_bytes(raw)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other(path: Path) -> None:
    torch.save([1], path) if path.suffix != ".json" else path.write_text("[]")


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", turned),
        ("optimizer.pt", turned),
        ("scheduler.pt", half),
        ("scheduler.pt", other),
        ("rng_state.pth", Path.unlink),
        ("rng_state.pth", as_pipe),
        ("trainer_state.json", other),
        ("trainer_state.json", half),
        ("trainer_state.json", Path.unlink),  # as a kill leaves it
    ],
)
def test_an_earlier_checkpoint_is_taken(kind, tmp_path, name, damage):
    place = tmp_path / "again"
    shutil.copytree(kind.folder.parent, place)
    damage(place / kind.folder.name / "checkpoint-4" / name)
    shutil.rmtree(place / "out", ignore_errors=True) if kind.folder.name != "out" else None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = kind.run(place / "out", True)
    unfinished = (name, damage) == ("trainer_state.json", Path.unlink)
    assert any("checkpoint-4 cannot be gone on from" in str(warning.message) for warning in told) == (not unfinished)
    left = {path.name for path in (place / kind.folder.name).glob("*-checkpoint-*")}
    assert left == (set() if unfinished else {"damaged-checkpoint-4"})
    assert all(one.equal(two) for one, two in zip(found, kind.result, strict=True))
    assert (place / kind.folder.name / "checkpoint-6" / "checksums.json").is_file()


@pytest.mark.parametrize("name", ["teacher.npy", "projections.safetensors"])
def test_what_is_kept_beside_the_checkpoints(tmp_path, name):
    """The teacher's table is made again; the projections that were started from cannot be."""
    save_backbone("bert", tmp_path / "bert")
    result = of_embed(tmp_path / "out", False)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-6")
    turned(tmp_path / "out-checkpoints" / name)
    if name == "teacher.npy":
        assert all(one.equal(two) for one, two in zip(of_embed(tmp_path / "out", True), result, strict=True))
        return
    with pytest.raises(TrainingError, match="projections.safetensors is damaged"):
        of_embed(tmp_path / "out", True)


def test_an_adapter_goes_on(tmp_path):
    """A training of PEFT's weights alone, whose checkpoints have no others."""
    peft = pytest.importorskip("peft")
    sentence_model(save_backbone("bert", tmp_path / "bert")).save_pretrained(str(tmp_path / "encoder"))
    rows = [{"anchor": text, "positive": f"{text} w9"} for text in TEXTS]

    def run(resume: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = load_encoder(tmp_path / "encoder")
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"]))
        train(model, rows, "1x8,4x32", folder=tmp_path / "out", resume=resume, **QUICK)
        return [value.clone() for value in model.state_dict().values()]

    result = run(False)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-6")
    half(tmp_path / "out-checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="checkpoint-4 cannot be gone on from .*adapter_model.safetensors"):
        found = run(True)
    assert all(one.equal(two) for one, two in zip(found, result, strict=True))
