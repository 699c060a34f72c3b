"""Checkpoints of both wings: where a training goes on, and what cannot be gone on from."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nestling.checkpoints import FILES, begin, last_whole
from nestling.errors import TrainingError

JOB = {"model": 1, "steps": 4}


def checkpoint(folder, step: int):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"x": torch.ones(2)}, path / "model.safetensors")
    torch.save({"state": torch.ones(2)}, path / "optimizer.pt")
    torch.save({}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({}))
    return path


def test_the_last_whole_one_is_gone_on_from(tmp_path):
    assert begin(tmp_path / "job", JOB, resume=False) is None
    first, last = checkpoint(tmp_path / "job", 2), checkpoint(tmp_path / "job", 10)
    assert begin(tmp_path / "job", JOB, resume=True) == last
    (last / FILES[1]).write_bytes(b"half")
    assert begin(tmp_path / "job", JOB, resume=True) == first


def test_checkpoints_of_which_none_is_whole_are_no_start(tmp_path):
    """To begin at step 1 as if nothing had been there would be to lose a training without a word."""
    begin(tmp_path / "job", JOB, resume=False)
    assert begin(tmp_path / "job", JOB, resume=True) is None  # stopped before its first one
    first = checkpoint(tmp_path / "job", 2)
    (first / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match="no checkpoint is whole, of checkpoint-2: remove them"):
        begin(tmp_path / "job", JOB, resume=True)
    (first / "trainer_state.json").unlink()  # which is written last: stopped while its first one was written
    assert begin(tmp_path / "job", JOB, resume=True) is None
    (checkpoint(tmp_path / "job", 4) / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match="no checkpoint is whole, of checkpoint-2, checkpoint-4: remove them"):
        begin(tmp_path / "job", JOB, resume=True)


def test_optimisers_of_another_device_are_read_on_this_one(tmp_path, monkeypatch):
    """A checkpoint of a GPU must not look damaged where there is none, nor fill one only to be looked at."""
    checkpoint(tmp_path, 1)
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.append(options) or load(*args, **options))
    assert last_whole(tmp_path).name == "checkpoint-1"
    assert seen == [{"map_location": "cpu", "weights_only": True}]
