"""One training, from its folder to what it saves: all that is written to the disk, in the order in which it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor
from transformers import TrainerCallback

from nestling.embed.export.card import trained_card
from nestling.embed.model.dropout import without_dropout
from nestling.embed.model.folder import PROJECTIONS_FILE, read_projections
from nestling.embed.model.modes import checkpointed, forward_kept, modes_kept
from nestling.embed.model.own import remember
from nestling.embed.training.data import Examples
from nestling.embed.training.job import TrainingJob
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.measures import Measures
from nestling.embed.training.result import Trained, save
from nestling.embed.training.start import projected_depths, start_projections
from nestling.embed.training.teacher import TEACHER_FILE, numbered, remove_stale, shared_table, tables_in
from nestling.embed.training.trainer import (
    Averaged,
    Cleared,
    ProgressCallback,
    SizesTrainer,
    trained_projections,
    without_bars,
)
from nestling.errors import TrainingError
from nestling.files.checksums import damaged, write_manifest
from nestling.jobs.arguments import remove_printer, stopped
from nestling.jobs.callbacks import have_stopped, restore
from nestling.jobs.checkpoints import begin, last_whole, run
from nestling.jobs.processes import processes, rank
from nestling.jobs.progress import progress_bar
from nestling.jobs.undo import Undo, withdrawn


@dataclass(frozen=True)
class Run:
    """A training whose options have been checked.

    Attributes:
        work: the folder of the checkpoints.
        rows: numbers of the examples, batch after batch.
    """

    job: TrainingJob
    work: Path
    options: SentenceTransformerTrainingArguments
    rows: Tensor
    callbacks: Sequence[TrainerCallback]
    measures: Measures | None

    def run(self) -> Trained:
        """Train, from the start or from the last whole checkpoint, and save the result.

        Raises:
            TrainingError: as `ElasticEncoder.train`.
        """
        progress = ProgressCallback(self.job.ladder, self.options.max_steps, self.job.config.progress)
        with withdrawn(self.work, unless=lambda: progress.started or bool(tables_in(self.work))):
            identity = self.job.identity()
            checkpoint = begin(self.work, identity, self.job.config.resume, self._check_projections)
            restore(self.callbacks, checkpoint)
            loss, numbers = self._start()
            undo = Undo(loss)
            try:
                trainer, info = self._train(loss, numbers, progress, checkpoint)
                if self._keeps_start(trainer, info):
                    undo.put_back()
                return self._finish(trainer, loss, {**_settings(identity), **info})
            except BaseException:
                if not progress.ended or last_whole(self.work):  # else what cannot be saved would be lost
                    undo.put_back()
                raise
            finally:
                progress.bar.stop()

    def _start(self) -> tuple[StarbucksLoss, Tensor | None]:
        """The loss with its start projections and the teacher's table, and which of its rows each example has."""
        job, options, resume = self.job, self.options, self.job.config.resume
        with options.main_process_first(local=False, desc="clean"):
            if rank() == 0:
                remove_stale(self.work, resume)
                if resume and PROJECTIONS_FILE in damaged(self.work, TrainingError):
                    raise TrainingError(f"{self.work / PROJECTIONS_FILE} is damaged: start again in another folder")
        table = taught = numbers = None
        if job.distils and job.teacher is not None:
            entries, numbers = numbered(job.examples.columns, job.teacher_prompts)
            table = _table(self.work / TEACHER_FILE, job.teacher, entries, job.config.progress)
            taught = torch.from_numpy(table)
        with options.main_process_first(local=False, desc="start"):
            kept, written = self.work / PROJECTIONS_FILE, resume or rank() > 0  # the first process writes them
            start = start_projections(job, kept, written, taught, numbers)
        if rank() == 0:
            write_manifest(
                self.work, [name for name in (TEACHER_FILE, PROJECTIONS_FILE) if (self.work / name).is_file()]
            )
        for module in start.values():  # copies: those of a user's own loss are as the user left them
            module.requires_grad_(job.trains_projections)
        return job.loss(start, table), numbers

    def _check_projections(self, checkpoint: Path) -> None:
        """Whether a checkpoint has the projections that are trained, if there are any."""
        if self.job.trains_projections:
            path, kind = checkpoint / PROJECTIONS_FILE, self.job.projections
            needed = kind if isinstance(kind, Mapping) else projected_depths(self.job.ladder)
            if missing := set(needed) - set(read_projections(path)):
                raise TrainingError(f"{path} lacks the projections of depths {sorted(missing)}")

    def _train(
        self, loss: StarbucksLoss, numbers: Tensor | None, progress: ProgressCallback, checkpoint: Path | None
    ) -> tuple[SizesTrainer, dict[str, Any]]:
        """Train the model and the projections of the loss: the trainer, and what is to be said of it."""
        job, options, rows = self.job, self.options, self.rows
        model = job.encoder.model
        turns: dict[int, Any] = {int(depth): module for depth, module in loss.projections.items()}
        if checkpoint is not None and have_stopped(self.callbacks):  # there is no step left
            batch = len(rows) // options.max_steps
            options.max_steps = int(checkpoint.name.rsplit("-", 1)[-1])
            rows = rows[: options.max_steps * batch]
        trainer = SizesTrainer(
            model, options, train_dataset=dataset(job.examples, numbers, rows), loss=loss,
            evaluator=None if self.measures is None else self.measures.during(turns),
            callbacks=[progress, Averaged(trained_projections(loss)), Cleared(), *self.callbacks],
        )  # fmt: skip
        remove_printer(trainer)
        with (
            modes_kept(model), forward_kept(model), without_bars(), without_dropout(model, off=not job.config.dropout),
            checkpointed(job.encoder.backbone, options),
        ):  # fmt: skip
            seconds = run(trainer, self.work, checkpoint)
        loss.projections.requires_grad_(False)
        info: dict[str, Any] = {"teacher": job.teacher is not None, **stopped(trainer, job.steps)}
        info["seconds"] = round(seconds)
        best = trainer.state.best_model_checkpoint if options.load_best_model_at_end else None
        if best is not None:
            info |= {"kept": "best", "best_step": int(best.rsplit("-", 1)[-1]), "best": trainer.state.best_metric}
        else:
            info["kept"] = "last"
        return trainer, info | {"left_out": job.examples.left_out, "curve": progress.points}

    def _keeps_start(self, trainer: SizesTrainer, info: dict[str, Any]) -> bool:
        """Whether the start was measured, and is as good as what would be kept; ``info`` then says so."""
        name = self.options.metric_for_best_model
        if self.measures is None or name is None:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        measured = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        start, end = measured.get(0), info.get("best", measured.get(trainer.state.global_step))
        if start is None or end is None or math.isnan(start):
            return False
        if end > start if self.options.greater_is_better else end < start:
            return False
        info |= {"kept": "start", "best_step": 0, "best": start}
        return True

    def _finish(self, trainer: SizesTrainer, loss: StarbucksLoss, info: dict[str, Any]) -> Trained:
        """Save what was kept, if there is a place for it."""
        model, out = self.job.encoder.model, self.job.config.output_dir
        turns: dict[int, Any] = {int(depth): module for depth, module in loss.projections.items()}
        trained = Trained(out, self.job.ladder, turns, info)
        remember(model, turns)
        if out is not None and trainer.is_world_process_zero():
            card = trained_card(model, self.job.ladder, info, turns)
            save(model, trained, "training", card, self.job.config.resume)
        trainer.accelerator.wait_for_everyone()
        return trained


def _table(path: Path, teacher: SentenceTransformer, entries: list[tuple[str, str]], progress: bool) -> np.ndarray:
    """The teacher's embeddings, from the file if this training has written them already."""
    with progress_bar(progress and rank() == 0) as bar:
        task = bar.add_task("embedding by the teacher", total=len(entries[:: processes()]))
        shared_table(path, teacher, entries, rank(), processes(), lambda count: bar.advance(task, count))
    return np.load(path, mmap_mode="c")


def dataset(examples: Examples, numbers: Tensor | None, rows: Tensor):
    """The rows in the order of the batches, as a `datasets.Dataset`."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = dict(examples.columns)
    if numbers is not None:
        columns["label"] = numbers.tolist()
    elif examples.labels is not None:
        columns["label"] = examples.labels
    return Dataset.from_dict(columns).select(rows.tolist())


def _settings(identity: dict[str, Any]) -> dict[str, Any]:
    """What ``nestling.json`` says of the settings of a training: its sizes stand beside them."""
    left_out = ("model", "pooling", "sizes", "data", "teacher")
    return {key: value for key, value in identity.items() if key not in left_out}
