"""How far a distillation is: what was trained, the optimiser, the curve and the best so far, in a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nestling.embed.training.follower import Follower
from nestling.errors import TrainingError
from nestling.files.fields import Fields
from nestling.files.folders import Parts, read_sealed, sha256, write_folder
from nestling.files.reading import read_object
from nestling.files.temporary import private_temporary_folder
from nestling.files.writing import check_folder, write_file
from nestling.report.results import plain

JOB_FILE, STATE_FILE, TENSORS_FILE, CHECKPOINT = "training.json", "state.json", "state.safetensors", "checkpoint"
PARTS = Parts(STATE_FILE, (TENSORS_FILE,))
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class DistilState:
    """The state of a distillation, in its folder.

    Attributes:
        folder: of the checkpoint and of the teacher's vectors.
        step, steps: done, and all.
        points: the curve: losses and measurements by step.
        best, best_step: the best measurement, and when.
        recent, counted: losses since the last point, added up, and of how many steps.
    """

    folder: Path
    keeps: bool
    step: int = 0
    steps: int = 0
    points: list[dict[str, float]] = field(default_factory=list)
    best: float = -math.inf
    best_step: int = 0
    recent: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    before: float = 0.0
    began: float = field(default_factory=time.monotonic)
    read: dict[str, Tensor] = field(default_factory=dict)
    best_tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path | None, identity: dict[str, Any], resume: bool) -> Iterator[DistilState]:
        """The state of a training: new, or as its checkpoint has it. Without a folder nothing outlasts the block.

        Raises:
            TrainingError: the folder holds another training, or one that is not to be resumed, or is damaged.
        """
        if folder is None:
            with private_temporary_folder() as work:
                yield cls(work, keeps=False)
            return
        check_folder(folder)
        job, path = json.loads(json.dumps(plain(identity))), folder / JOB_FILE
        if not resume:
            if (folder / CHECKPOINT).exists():
                raise TrainingError(f"{folder} holds a checkpoint: resume that training, or choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(job, indent=1) + "\n")
            yield cls(folder, keeps=True)
            return
        if not path.is_file():
            raise TrainingError(f"{folder} is no training to resume: {JOB_FILE} is missing")
        theirs = read_object(path, TrainingError)
        if wrong := [f"{key}: {theirs.get(key)}, now {job[key]}" for key in job if theirs.get(key) != job[key]]:
            raise TrainingError(f"{folder} holds another training ({'; '.join(wrong)})")
        state = cls(folder, keeps=True)
        if (folder / CHECKPOINT).exists():
            state._load()
        yield state

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(self.read)

    @property
    def kept(self) -> str:
        """What there is to go on from, in words."""
        return f"the checkpoint in {self.folder} is kept" if self.keeps and self.steps else "there is no checkpoint"

    def share(self, minutes: float | None) -> float:
        """How much of the training is done, by its steps or by its time."""
        return max(self.step / self.steps, 0 if minutes is None else self.seconds / (60 * minutes))

    def stepped(self, losses: Mapping[str, float]) -> None:
        """Count a step and its losses."""
        self.step, self.counted = self.step + 1, self.counted + 1
        for name, value in losses.items():
            self.recent[name] = self.recent.get(name, 0.0) + value

    def measured(self, follower: Follower, metrics: Mapping[str, float]) -> None:
        """Put losses and measurements into the curve, and keep what is best. What cannot be measured is best later."""
        losses = {name: value / self.counted for name, value in self.recent.items()}
        point = {"step": self.step, **({"loss": sum(losses.values())} if losses else {}), **losses, **metrics}
        self.recent, self.counted = {}, 0
        if len(point) > 1:
            self.points.append(point)
        value = metrics.get("mean")
        if value is None or value > self.best or not self.best_tensors:
            self.best, self.best_step = -math.inf if value is None else value, self.step
            self.best_tensors = follower.tensors()

    def save(self, follower: Follower, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint in the place of the one before, whole or not at all."""
        if not self.keeps:
            return
        tensors = {f"now.{name}": value for name, value in follower.tensors().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_tensors.items()}
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": moments[name].detach().cpu() for name in MOMENTS}
        names = ("step", "steps", "points", "best", "best_step", "recent", "counted")
        value = {name: getattr(self, name) for name in names} | {"seconds": self.seconds}
        value["best"] = None if math.isinf(self.best) else self.best

        def fill(new: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / TENSORS_FILE)
            text = json.dumps({**value, "sha256": sha256(new / TENSORS_FILE)}, indent=1)
            (new / STATE_FILE).write_text(text + "\n", "utf-8")

        write_folder(self.folder / CHECKPOINT, fill, over=PARTS)

    def _load(self) -> None:
        folder = self.folder / CHECKPOINT
        path = folder / STATE_FILE
        advice = f"remove {folder} to start again"
        try:
            found = Fields(path, read_object(path, TrainingError), TrainingError)
            content = read_sealed(folder / TENSORS_FILE, found.text("sha256"))
            if content is None:
                raise TrainingError(f"{folder / TENSORS_FILE} is damaged (sha256 differs): {advice}")
            self.read = load(content)
            self.step, self.steps = found.whole("step"), found.whole("steps", 1)
            self.points, self.recent = found.array("points"), dict(found.object("recent").values)
            self.best_step, self.counted = found.whole("best_step"), found.whole("counted")
            self.best = found.number("best", default=-math.inf)
            self.before = found.number("seconds", 0)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{folder} is damaged ({error}): {advice}") from error
        self.best_tensors = {name[5:]: value for name, value in self.read.items() if name.startswith("best.")}

    def put_back(self, follower: Follower, optimizer: torch.optim.Optimizer) -> None:
        """Let a follower and its optimiser be where the checkpoint was written, if there is one."""
        if not self.resumes:
            return
        follower.put({name[4:]: value for name, value in self.read.items() if name.startswith("now.")})
        state = optimizer.state_dict()
        count = sum(len(group["params"]) for group in state["param_groups"])
        state["state"] = {n: {m: self.read[f"optimizer.{n}.{m}"] for m in MOMENTS} for n in range(count)}
        optimizer.load_state_dict(state)

    def settle(self, follower: Follower) -> None:
        """Let the follower be what is kept."""
        follower.put(self.best_tensors)

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return self.before + time.monotonic() - self.began

    def info(self) -> dict[str, Any]:
        """What is to be said of the training."""
        measured = not math.isinf(self.best)
        kept = "last" if not measured else "best" if self.best_step else "start"
        best = {"best": self.best} if measured else {}
        return {"kept": kept, "best_step": self.best_step, **best, "seconds": round(self.seconds),
                "curve": self.points}  # fmt: skip
