"""Checkpoints of all trainings: where one goes on, and what cannot be gone on from."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nestling.errors import NestlingError, TrainingError
from nestling.files.checksums import MANIFEST, check_manifest, write_manifest
from nestling.jobs.checkpoints import begin, last_whole
from nestling.jobs.whole import that_is_read

JOB = {"model": 1, "steps": 4}


def checkpoint(folder, step: int, sealed: bool = True, **state):
    """As transformers writes one."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"x": torch.arange(64.0)}, path / "model.safetensors")
    torch.save({"state": {0: torch.arange(64.0)}, "param_groups": [{}]}, path / "optimizer.pt")
    torch.save({"last_epoch": step}, path / "scheduler.pt")
    random = {"python": (3, (1, 2), None), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(random, path / "rng_state.pth")
    state = {"global_step": step, "epoch": 0.5, "log_history": [{"step": 1, "loss": 0.5}]} | state
    (path / "trainer_state.json").write_text(json.dumps(state))
    if sealed:
        write_manifest(path, that_is_read(path))
    return path


@pytest.fixture
def folder(tmp_path):
    """A training that was stopped behind its checkpoints 2 and 10."""
    place = tmp_path / "job"
    assert begin(place, JOB, resume=False) is None
    checkpoint(place, 2), checkpoint(place, 10)
    return place


def resumed(folder) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(begin(folder, JOB, resume=True).name.split("-")[1])


def flip(path, place: int = -20) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


def replaced_by_pipe(path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_device(path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replaced_by_circle(path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "list": lambda path: path.write_text("[]"),
    "pipe": replaced_by_pipe,
    "folder": replaced_by_folder,
    "device": replaced_by_device,
    "circle": replaced_by_circle,
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_the_last_one_that_is_whole_in_every_file_is_gone_on_from(folder, name, how):
    assert resumed(folder) == 10
    (folder / "checkpoint-10" / MANIFEST).unlink()  # as of a kill right behind the last file, or of an older version
    assert resumed(folder) == 10
    DAMAGE[how](folder / "checkpoint-10" / name)
    assert last_whole(folder).name == "checkpoint-2"
    assert resumed(folder) == 2
    assert not (folder / "checkpoint-10").exists(), "the training writes it again: nothing may be in its way"


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_has_turned_is_seen(folder, name):
    flip(folder / "checkpoint-10" / name)
    assert resumed(folder) == 2


def test_what_is_not_read_may_be_changed(folder):
    last = folder / "checkpoint-10"
    (last / "training_args.bin").write_bytes(b"half")
    (last / "README.md").write_bytes(b"\xff")
    assert resumed(folder) == 10


@pytest.mark.parametrize(
    "state, named",
    [
        ({"global_step": 9}, "global_step"),
        ({"global_step": "10"}, "global_step"),
        ({"global_step": 10**400}, "trainer_state.json"),
        ({"epoch": "half"}, "epoch"),
        ({"epoch": -1}, "epoch"),
        ({"log_history": {}}, "log_history"),
        ({"log_history": [3]}, "log_history"),
        ({"log_history": [{"loss": 1}]}, "step"),
        ({"log_history": [{"step": 1, "loss": []}]}, "loss"),
        ({"log_history": [{"step": 1, "kl_1x8": "x"}]}, "kl_1x8"),
        ({"log_history": [{"step": 1, "eval_0.5_loss": None}]}, "eval_0.5_loss"),
        ({"epnch": 1}, "epnch"),
        ({"train_batch_size": [4]}, "train_batch_size"),
        ({"stateful_callbacks": [1]}, "stateful_callbacks"),
        ({"stateful_callbacks": {"Clock": 3}}, "Clock"),
        ({"stateful_callbacks": {"Clock": {"attributes": {"seconds": "long"}}}}, "seconds"),
        ({"stateful_callbacks": {"Clock": {"attributes": {"minutes": 1}}}}, "seconds"),
        ({"best_model_checkpoint": 3}, "best_model_checkpoint"),
        ({"best_model_checkpoint": "job/checkpoint-4"}, "checkpoint-4"),  # which is gone
    ],
)
def test_a_state_that_the_trainer_cannot_use_is_named(tmp_path, state, named):
    begin(tmp_path / "job", JOB, resume=False)
    checkpoint(tmp_path / "job", 10, sealed=False, **state)
    with pytest.raises(TrainingError, match=named) as error:
        begin(tmp_path / "job", JOB, resume=True)
    assert "trainer_state.json" in str(error.value) or named == "checkpoint-4"


def test_numbers_that_are_none_may_have_been_logged(tmp_path):
    """Gradient scaling in half precision meets infinities by design."""
    begin(tmp_path / "job", JOB, resume=False)
    history = [{"step": 1, "loss": float("inf"), "grad_norm": float("nan")}, {"step": 2, "own": ["a", None]}]
    checkpoint(tmp_path / "job", 2, log_history=history)
    assert resumed(tmp_path / "job") == 2


def test_the_best_checkpoint_is_read_too(tmp_path):
    """A training ends with it; its folder may have been moved with all others."""
    begin(tmp_path / "job", JOB, resume=False)
    first = checkpoint(tmp_path / "job", 2)
    checkpoint(tmp_path / "job", 4, best_model_checkpoint="elsewhere/job/checkpoint-2")
    assert resumed(tmp_path / "job") == 4
    flip(first / "model.safetensors")
    with pytest.raises(TrainingError, match="checkpoint-4: .*checkpoint-2/model.safetensors is damaged"):
        begin(tmp_path / "job", JOB, resume=True)


def peft(path) -> None:
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")


def peft_by_name(path) -> None:
    (path / "lora").mkdir()
    (path / "model.safetensors").rename(path / "lora" / "adapter_model.safetensors")


def sharded(path) -> None:
    save_file({"y": torch.ones(2)}, path / "model-00002-of-00002.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def in_a_folder(path) -> None:
    (path / "0_Transformer").mkdir()
    (path / "model.safetensors").rename(path / "0_Transformer" / "model.safetensors")
    (path / "modules.json").write_text('[{"path": "0_Transformer"}, {"path": "1_Pooling"}]')


@pytest.mark.parametrize("form", [peft, peft_by_name, sharded, in_a_folder])
def test_weights_of_every_form(tmp_path, form):
    begin(tmp_path / "job", JOB, resume=False)
    for step in (2, 4):
        form(checkpoint(tmp_path / "job", step, sealed=False))
    assert resumed(tmp_path / "job") == 4
    last = sorted((tmp_path / "job" / "checkpoint-4").rglob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert resumed(tmp_path / "job") == 2


@pytest.mark.parametrize("shards", [[], {"x": 3}, {"x": "../model.safetensors"}, {"z": "model.safetensors"}])
def test_an_index_of_shards_that_names_others(tmp_path, shards):
    begin(tmp_path / "job", JOB, resume=False)
    path = checkpoint(tmp_path / "job", 2, sealed=False)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(TrainingError, match="index.json|model.safetensors"):
        begin(tmp_path / "job", JOB, resume=True)


def test_a_file_of_each_process_is_checked(tmp_path):
    begin(tmp_path / "job", JOB, resume=False)
    for step in (2, 4):
        path = checkpoint(tmp_path / "job", step, sealed=False)
        (path / "rng_state.pth").rename(path / "rng_state_0.pth")
        (path / "rng_state_1.pth").write_bytes((path / "rng_state_0.pth").read_bytes())
        torch.save({"scale": 1.0}, path / "scaler.pt")
    assert resumed(tmp_path / "job") == 4
    flip(tmp_path / "job" / "checkpoint-4" / "rng_state_1.pth", 1000)
    assert resumed(tmp_path / "job") == 2
    torch.save([1.0], tmp_path / "job" / "checkpoint-2" / "scaler.pt")
    with pytest.raises(TrainingError, match="scaler.pt"):
        begin(tmp_path / "job", JOB, resume=True)


def test_what_this_kind_of_training_reads_is_checked(folder):
    def check(path):
        if path.name == "checkpoint-10":
            raise KeyError("position")

    with pytest.warns(UserWarning, match="checkpoint-10 cannot be gone on from .*position"):
        assert begin(folder, JOB, True, check).name == "checkpoint-2"
    assert (folder / "damaged-checkpoint-10" / "model.safetensors").is_file(), "nothing is lost"


@pytest.mark.parametrize("name", ["checkpoint-9", "checkpoint-abc", "checkpoint-", "checkpoint-²", "checkpoint-1e3"])
@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_strange_names(folder, name, make):
    """The trainer removes folders of such names with old checkpoints, and cannot write where a file is."""
    getattr(folder / name, make)()
    if make == "touch" and name != "checkpoint-9":
        assert resumed(folder) == 10  # a file of the user, which is in nobody's way
    elif make == "mkdir" and name == "checkpoint-9":
        assert resumed(folder) == 10  # half written, and older
    else:
        with pytest.raises(TrainingError, match=f"{name} is no checkpoint.*move it away"):
            begin(folder, JOB, resume=True)
    with pytest.raises(TrainingError, match="holds checkpoints already"):
        begin(folder, JOB, resume=False)
    assert (folder / name).exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_job_that_cannot_be_read(folder, how):
    path = folder / "training.json"
    DAMAGE[how](path)
    with pytest.raises(TrainingError, match="training.json"):
        begin(folder, JOB, resume=True)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"model": NaN}', '{"a":' * 5000 + "1" + "}" * 5000, '{"model": 1' + "0" * 5000 + "}"]
)
def test_a_job_of_other_types(folder, text):
    (folder / "training.json").write_text(text)
    with pytest.raises(TrainingError, match="training.json is damaged"):
        begin(folder, JOB, resume=True)
    (folder / "training.json").write_text(json.dumps({"model": [1] * 10_000}))
    with pytest.raises(TrainingError, match="holds another training") as error:
        begin(folder, JOB, resume=True)
    assert len(str(error.value)) < 1000


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("mine")
    for resume in (True, False):
        with pytest.raises(TrainingError, match="file"):
            begin(tmp_path / "file", JOB, resume)
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoints_of_which_none_is_whole_are_no_start(tmp_path):
    """To begin at step 1 as if nothing had been there would be to lose a training without a word."""
    begin(tmp_path / "job", JOB, resume=False)
    assert begin(tmp_path / "job", JOB, resume=True) is None  # stopped before its first one
    first = checkpoint(tmp_path / "job", 2)
    (first / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match="no checkpoint is whole, of checkpoint-2: remove them"):
        begin(tmp_path / "job", JOB, resume=True)
    (checkpoint(tmp_path / "job", 4) / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match="no checkpoint is whole, of checkpoint-2, checkpoint-4: remove them"):
        begin(tmp_path / "job", JOB, resume=True)


def test_what_a_kill_left_half_written_is_set_aside(tmp_path):
    begin(tmp_path / "job", JOB, resume=False)
    first = checkpoint(tmp_path / "job", 2)
    (first / "trainer_state.json").unlink()  # which is written last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert begin(tmp_path / "job", JOB, resume=True) is None
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"training.json", "unfinished-checkpoint-2"}


def test_checksums(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, ["a", "sub/b"])
    check_manifest(tmp_path)
    (tmp_path / "sub/b").write_text("c")
    with pytest.raises(TrainingError, match="sub/b is damaged"):
        check_manifest(tmp_path, TrainingError)
    (tmp_path / "sub/b").unlink()
    with pytest.raises(TrainingError, match="sub/b: no such file"):
        check_manifest(tmp_path, TrainingError)
    for wrong in (
        "[]",
        "{}",
        '{"sha256": []}',
        '{"sha256": {"a": 3}}',
        '{"sha256": {"a": "b"}}',
        '{"sha256": {"a": "b"}, "bytes": {"a": "b"}}',
        "{",
    ):
        (tmp_path / MANIFEST).write_text(wrong)
        with pytest.raises(NestlingError, match=MANIFEST):
            check_manifest(tmp_path)


def test_optimisers_of_another_device_are_read_on_this_one(tmp_path, monkeypatch):
    """A checkpoint of a GPU must not look damaged where there is none, nor fill one only to be looked at."""
    checkpoint(tmp_path, 1)
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.append(options) or load(*args, **options))
    assert last_whole(tmp_path).name == "checkpoint-1"
    assert {(options["map_location"], options["weights_only"]) for options in seen} == {("cpu", True)}
