"""Checkpoints of a training: whose they are, which of them are whole, where to go on, and what stopped it."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from nestling.errors import TrainingError
from nestling.writing import check_folder, is_full, write_file

JOB_FILE = "training.json"
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def begin(folder: Path, job: dict, resume: bool) -> Path | None:
    """Make the folder, or check that it is this job's; the checkpoint to go on from, None for the start.

    Args:
        job: what a resumed training must agree on, plain JSON values.

    Raises:
        TrainingError: if there are checkpoints and ``resume`` is not set, or if they are of another job, or none of
            them can be gone on from. The first one alone, half written, is no error: nothing else is lost.
    """
    job = json.loads(json.dumps(job))
    path = folder / JOB_FILE
    if not resume:
        if list(folder.glob("checkpoint-*")):
            raise TrainingError(f"{folder} holds checkpoints already: resume that training, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(job, indent=2))
        return None
    try:
        theirs = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"{folder} is no training to resume: {JOB_FILE} is missing") from None
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}): start again in another folder") from error
    if wrong := [f"{k}: {theirs.get(k)}, now {job[k]}" for k in job if theirs.get(k) != job[k]]:
        raise TrainingError(f"{folder} holds another training ({'; '.join(wrong)})")
    checkpoint, found = last_whole(folder), sorted(folder.glob("checkpoint-*"))
    if checkpoint is None and (len(found) > 1 or any(map(_is_complete, found))):
        names = ", ".join(path.name for path in found)
        raise TrainingError(f"{folder}: no checkpoint is whole, of {names}: remove them to start again")
    return checkpoint


def attributes(checkpoint: Path, callback: type) -> dict[str, Any] | None:
    """What a callback of that class said of itself in a checkpoint's trainer_state.json; None if nothing."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state.get("stateful_callbacks", {}).get(callback.__name__, {}).get("attributes")


class Clock(TrainerCallback, ExportableState):
    """How long a training takes; each checkpoint's trainer_state.json says how long it took up to there."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.start = seconds, time.monotonic()

    @classmethod
    def of(cls, checkpoint: Path | None) -> "Clock":
        """It goes on where a checkpoint was written; at 0 if there is none, or it does not say."""
        return cls(**(attributes(checkpoint, cls) or {})) if checkpoint else cls()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def run(trainer: Trainer, folder: Path, checkpoint: Path | None) -> float:
    """Train; whatever stops it says at which step, and what there is to go on from.

    Returns:
        The seconds that it took; those of a training that was stopped and resumed are added up.

    Raises:
        TrainingError: the training cannot go on, or a checkpoint cannot be written.
    """
    clock = Clock.of(checkpoint)
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, OSError, SafetensorError) as error:
        whole = last_whole(folder)
        kept = "there is no checkpoint" if whole is None else f"{whole.name} is kept"
        why = f"the disk is full ({error})" if is_full(folder) else error
        raise TrainingError(f"step {trainer.state.global_step + 1}: {why}; {kept} in {folder}") from error
    return clock.seconds


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that can be gone on from. One that was being written when its process was killed cannot."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in FILES)


def _is_whole(checkpoint: Path) -> bool:
    if not _is_complete(checkpoint):
        return False
    with contextlib.suppress(Exception):  # damaged files fail in any way
        load_file(checkpoint / FILES[0])
        torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        return True
    return False


def check_place(folder: Path, resume: bool) -> None:
    """Whether checkpoints can be written to a folder, before anything is computed.

    Raises:
        TrainingError: there are checkpoints and ``resume`` is not set, or it is and there is nothing to resume, or
            a file of somebody else's has the name of the training's.
        FileError: the folder cannot be made or written to.
    """
    check_folder(folder)
    path = folder / JOB_FILE
    if resume:
        if not path.exists():
            raise TrainingError(f"{folder} is no training to resume: {JOB_FILE} is missing")
        return
    if any(folder.glob("checkpoint-*")):
        raise TrainingError(f"{folder} holds checkpoints already: resume that training, or choose another folder")
    if path.exists() and not _is_job(path):
        raise TrainingError(f"{path} is not of a training: choose another folder, or move it away")


def _is_job(path: Path) -> bool:
    """Whether a file is one that an earlier training wrote."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"steps", "seed"} <= set(found)
