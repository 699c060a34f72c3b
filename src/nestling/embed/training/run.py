"""One training, from its folder to what it saves: all that is written to the disk, in the order in which it is."""

from __future__ import annotations

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
from nestling.embed.ladder import Ladder
from nestling.embed.model.dropout import without_dropout
from nestling.embed.model.folder import PROJECTIONS_FILE, read_projections
from nestling.embed.model.modes import checkpointed, forward_kept, modes_kept
from nestling.embed.model.own import remember
from nestling.embed.model.projection import Projection
from nestling.embed.training.arguments import processes, rank
from nestling.embed.training.data import Examples
from nestling.embed.training.job import Plan
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.measures import Measures
from nestling.embed.training.result import Trained, save
from nestling.embed.training.start import start_projections, turned_depths
from nestling.embed.training.teacher import TEACHER_FILE, numbered, remove_stale, shared_table, tables_in
from nestling.embed.training.trainer import Averaged, Cleared, CupTrainer, Watch, trained_projections, without_bars
from nestling.errors import TrainingError
from nestling.files.checksums import damaged, write_manifest
from nestling.jobs.arguments import remove_printer, stopped
from nestling.jobs.callbacks import have_stopped, restore
from nestling.jobs.checkpoints import begin, last_whole, run
from nestling.jobs.progress import progress_bar
from nestling.jobs.undo import Undo, withdrawn


@dataclass(frozen=True)
class Job:
    """A training whose options have been checked.

    Attributes:
        out, work: folders of the result and of the checkpoints.
        rows: numbers of the examples, batch after batch.
        prompts, teacher_prompts: by column.
        identity: what a resumed training must agree on.
    """

    model: SentenceTransformer
    plan: Plan
    ladder: Ladder
    recipe: Mapping[str, Any] | None
    projection: str | Mapping[int, Projection] | None
    projection_rate: float | None
    mini_batch_size: int | None
    out: Path
    work: Path
    options: SentenceTransformerTrainingArguments
    rows: Tensor
    prompts: dict[str, str]
    teacher_prompts: dict[str, str]
    dropout: bool
    callbacks: Sequence[TrainerCallback]
    measures: Measures | None
    identity: dict[str, Any]
    progress: bool

    def run(self, resume: bool) -> Trained:
        """Train, from the start or from the last whole checkpoint, and save the result.

        Raises:
            TrainingError: as `nestling.embed.training.train.train`.
        """
        watch = Watch(self.ladder, self.options.max_steps, self.progress)
        with withdrawn(self.work, unless=lambda: watch.started or bool(tables_in(self.work))):
            checkpoint = begin(self.work, self.identity, resume, self._check_projections)
            restore(self.callbacks, checkpoint)
            loss, numbers = self._start(resume)
            undo = Undo(loss)
            try:
                return self._train(loss, numbers, watch, checkpoint, resume)
            except BaseException:
                if not watch.ended or last_whole(self.work):  # else the weights would be lost if they cannot be saved
                    undo.put_back()
                raise
            finally:
                watch.bar.stop()

    def _start(self, resume: bool) -> tuple[StarbucksLoss, Tensor | None]:
        """The loss with its start projections and the teacher's table, and which of its rows each example has."""
        examples, options = self.plan.examples, self.options
        with options.main_process_first(local=False, desc="clean"):
            if rank() == 0:
                remove_stale(self.work, resume)
                if resume and PROJECTIONS_FILE in damaged(self.work, TrainingError):
                    raise TrainingError(f"{self.work / PROJECTIONS_FILE} is damaged: start again in another folder")
        table = taught = numbers = None
        if self.plan.distils:
            entries, numbers = numbered(examples.columns, self.teacher_prompts)
            table = _table(self.work / TEACHER_FILE, self.plan.teacher or self.model, entries, self.progress)
            taught = torch.from_numpy(table)
        with options.main_process_first(local=False, desc="start"):
            kept, written = self.work / PROJECTIONS_FILE, resume or rank() > 0  # the first process writes them
            start = start_projections(
                self.model, self.projection, self.ladder, examples, self.prompts, kept, written, taught, numbers
            )
        if rank() == 0:
            write_manifest(
                self.work, [name for name in (TEACHER_FILE, PROJECTIONS_FILE) if (self.work / name).is_file()]
            )
        for module in start.values():  # copies: those of a user's own loss are as the user left them
            module.requires_grad_(self.projection_rate is not None)
        return self.plan.loss(self.ladder, self.recipe, self.mini_batch_size, start, table), numbers

    def _check_projections(self, checkpoint: Path) -> None:
        """Whether a checkpoint has the projections that are trained, if there are any."""
        if self.projection and self.projection_rate is not None:
            path, kind = checkpoint / PROJECTIONS_FILE, self.projection
            needed = turned_depths(self.ladder) if isinstance(kind, str) else kind
            if missing := set(needed) - set(read_projections(path)):
                raise TrainingError(f"{path} lacks the projections of depths {sorted(missing)}")

    def _train(
        self, loss: StarbucksLoss, numbers: Tensor | None, watch: Watch, checkpoint: Path | None, resume: bool
    ) -> Trained:
        model, options, rows = self.model, self.options, self.rows
        turns: dict[int, Any] = {int(depth): module for depth, module in loss.projections.items()}
        if checkpoint is not None and have_stopped(self.callbacks):  # there is no step left
            batch = len(rows) // options.max_steps
            options.max_steps = int(checkpoint.name.rsplit("-", 1)[-1])
            rows = rows[: options.max_steps * batch]
        trainer = CupTrainer(
            model, options, train_dataset=dataset(self.plan.examples, numbers, rows), loss=loss,
            evaluator=None if self.measures is None else self.measures.during(turns),
            callbacks=[watch, Averaged(trained_projections(loss)), Cleared(), *self.callbacks],
        )  # fmt: skip
        remove_printer(trainer)
        with (
            modes_kept(model), forward_kept(model), without_bars(), without_dropout(model, off=not self.dropout),
            checkpointed(self.plan.encoder.backbone, options),
        ):  # fmt: skip
            seconds = run(trainer, self.work, checkpoint)
        loss.projections.requires_grad_(False)
        info = _info(self.identity, trainer, watch, seconds) | {"left_out": self.plan.examples.left_out}
        trained = Trained(self.out, self.ladder, turns, info)
        remember(model, turns)
        if trainer.is_world_process_zero():
            save(model, trained, "training", trained_card(model, self.ladder, info, turns), resume)
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


def _info(job: dict[str, Any], trainer: CupTrainer, watch: Watch, seconds: float) -> dict[str, Any]:
    """What ``nestling.json`` says of the training."""
    left_out = ("model", "pooling", "cups", "data", "teacher")
    kept = {key: value for key, value in job.items() if key not in left_out}
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    chosen = {} if best is None else {"best_step": int(best.rsplit("-", 1)[-1]), "best": trainer.state.best_metric}
    taught = {"teacher": job["teacher"] is not None, **stopped(trainer, job["steps"])}
    return {**kept, **taught, "seconds": round(seconds), **chosen, "curve": watch.points}
