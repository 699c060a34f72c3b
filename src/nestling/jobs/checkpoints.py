"""Checkpoints of a training: whose they are, which of them are whole, where to go on, and what stopped it."""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from nestling.errors import FileError, NestlingError, TrainingError
from nestling.files.checksums import check_manifest, write_manifest
from nestling.files.reading import read_object, reason, short
from nestling.files.writing import check_folder, is_full, write_file
from nestling.jobs.processes import rank
from nestling.jobs.whole import STATE_FILE, best_of, check_checkpoint, seconds_of, stateful, that_is_read

JOB_FILE = "training.json"
NUMBERED = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)
DAMAGED, UNFINISHED = "damaged-", "unfinished-"  # in front of names of checkpoints that cannot be gone on from
Check = Callable[[Path], object]


def begin(folder: Path, job: dict, resume: bool, check: Check = lambda checkpoint: None) -> Path | None:
    """Make the folder, or check that it is this job's; the checkpoint to go on from, None for the start.

    Checkpoints behind the one that is gone on from are damaged, or were being written when the training was stopped.
    They are set aside: the former with a warning, the latter until the training has come as far again.

    Args:
        job: what a resumed training must agree on, plain JSON values.
        check: raises for a checkpoint that lacks what this kind of training reads beside what all read.

    Raises:
        TrainingError: if there are checkpoints and ``resume`` is not set, or if they are of another job, or none of
            them can be gone on from. The first one alone, half written, is no error: nothing else is lost.
    """
    job = json.loads(json.dumps(job))
    path = folder / JOB_FILE
    if not resume:
        if os.path.lexists(folder) and not folder.is_dir():
            raise TrainingError(f"{folder} is not a folder: choose another place for the checkpoints")
        if list(folder.glob("checkpoint-*")):
            raise TrainingError(f"{folder} holds checkpoints already: resume that training, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(job, indent=2))
        return None
    if not os.path.lexists(path):
        raise TrainingError(f"{folder} is no training to resume: {JOB_FILE} is missing")
    theirs = read_object(path, TrainingError)
    if wrong := [f"{k}: {_shown(theirs.get(k))}, now {_shown(job[k])}" for k in job if theirs.get(k) != job[k]]:
        raise TrainingError(f"{folder} holds another training ({'; '.join(wrong)})")
    _check_names(folder)
    found = _numbered(folder)
    problems = {checkpoint: _problem(checkpoint, check) for checkpoint in found}
    whole = next((checkpoint for checkpoint, problem in problems.items() if problem is None), None)
    if whole is None and (len(found) > 1 or any((checkpoint / STATE_FILE).is_file() for checkpoint in found)):
        listed = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in problems.items())
        names = ", ".join(sorted(checkpoint.name for checkpoint in found))
        raise TrainingError(f"{folder}: no checkpoint is whole, of {names}: remove them to start again ({listed})")
    if rank() == 0:
        for checkpoint, problem in problems.items():
            if checkpoint == whole:
                break
            _set_aside(checkpoint, problem)
    return whole


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 300 else short(value, 300)


def attributes(checkpoint: Path, callback: type) -> dict[str, Any] | None:
    """What a callback of that class said of itself in a checkpoint's trainer_state.json; None if nothing.

    Raises:
        TrainingError: the file is damaged.
    """
    return stateful(read_object(checkpoint / STATE_FILE, TrainingError, finite=False), callback.__name__)


class Clock(TrainerCallback, ExportableState):
    """How long a training takes; each checkpoint's trainer_state.json says how long it took up to there."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.start, self.stepped = seconds, time.monotonic(), False

    @classmethod
    def of(cls, checkpoint: Path | None) -> "Clock":
        """It goes on where a checkpoint was written; at 0 if there is none, or it does not say."""
        return cls() if checkpoint is None else cls(seconds_of(attributes(checkpoint, cls), checkpoint))

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}


class Sealed(TrainerCallback):
    """Each checkpoint gets the checksums of its files, when all processes have written theirs."""

    def on_save(self, args, state, control, **kwargs):
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_manifest(folder, that_is_read(folder))


def run(trainer: Trainer, folder: Path, checkpoint: Path | None) -> float:
    """Train; whatever stops it says at which step, and what there is to go on from.

    Returns:
        The seconds that it took; those of a training that was stopped and resumed are added up.

    Raises:
        TrainingError: the training cannot go on, or a checkpoint cannot be read or written.
    """
    clock = Clock.of(checkpoint)
    trainer.add_callback(clock)
    trainer.add_callback(Sealed())
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, OSError, SafetensorError) as error:
        whole = last_whole(folder)
        kept = "there is no checkpoint" if whole is None else f"{whole.name} is kept"
        why = f"the disk is full ({error})" if is_full(folder) else error
        raise TrainingError(f"step {trainer.state.global_step + 1}: {why}; {kept} in {folder}") from error
    except Exception as error:
        if checkpoint is None or clock.stepped or isinstance(error, NestlingError):
            raise
        raise TrainingError(f"{checkpoint} cannot be gone on from ({reason(error)}): move it away") from error
    if trainer.is_world_process_zero():
        _remove_unfinished(folder, trainer.state.global_step)
    return clock.seconds


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that can be gone on from. One that was being written when its process was killed cannot."""
    return next((path for path in _numbered(folder) if _problem(path) is None), None)


def _numbered(folder: Path) -> list[Path]:
    """The folders of checkpoints, the last one first."""
    named = {path: NUMBERED.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    found = {path: int(number[1]) for path, number in named.items() if number}
    return sorted(found, key=found.__getitem__, reverse=True)


def _check_names(folder: Path) -> None:
    """Raises:
    TrainingError: something that is no checkpoint has the name of one: a folder, which would be removed with old
        checkpoints, or a file where a checkpoint will be written.
    """
    for path in folder.glob("checkpoint-*"):
        number, is_folder = NUMBERED.fullmatch(path.name), path.is_dir()
        if is_folder and not number:
            raise TrainingError(f"{path} is no checkpoint, without the number of a step: move it away")
        if number and not is_folder:
            raise TrainingError(f"{path} is no checkpoint, since it is not a folder: move it away")


def _problem(checkpoint: Path, check: Check = lambda checkpoint: None) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it can."""
    try:
        check_checkpoint(checkpoint)
        check(checkpoint)
        for folder in {checkpoint, best_of(checkpoint) or checkpoint}:
            check_manifest(folder, TrainingError)  # last: the others say what is wrong
    except Exception as error:  # damaged files fail in any way
        return str(error) if isinstance(error, TrainingError) else reason(error)
    return None


def _set_aside(checkpoint: Path, problem: str | None) -> None:
    """Out of the way of the training, which will write a checkpoint of that name again."""
    finished = os.path.lexists(checkpoint / STATE_FILE)  # which is written last
    place = checkpoint.with_name((DAMAGED if finished else UNFINISHED) + checkpoint.name)
    try:
        shutil.rmtree(place, ignore_errors=True)
        checkpoint.rename(place)
    except OSError as error:
        raise TrainingError(f"{checkpoint} is damaged ({problem}) and cannot be moved away ({error})") from error
    if finished:
        warnings.warn(f"{checkpoint} cannot be gone on from ({problem}): it is {place.name} now", stacklevel=3)


def _remove_unfinished(folder: Path, step: int) -> None:
    """Remove what was left of checkpoints up to a step, which the training has written anew."""
    for path in folder.glob(f"{UNFINISHED}checkpoint-*"):
        number = NUMBERED.fullmatch(path.name.removeprefix(UNFINISHED))
        if number and int(number[1]) <= step:
            shutil.rmtree(path, ignore_errors=True)


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
        return {"steps", "seed"} <= set(read_object(path))
    except FileError:
        return False
