"""SentenceTransformerTrainer with batches in a fixed order, that stops when a number is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor, distributed, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.utils import logging

from nestling.embed.ladder import Ladder
from nestling.embed.model.folder import PROJECTIONS_FILE, read_projections, write_projections
from nestling.embed.model.lora import TRAINED_FILE, has_adapters, load_trained, save_trained
from nestling.embed.model.modes import forward_kept
from nestling.embed.model.parts import unwrapped
from nestling.embed.model.projection import Projection
from nestling.errors import TrainingError
from nestling.jobs.arguments import rehearsed
from nestling.jobs.progress import progress_bar


class SizesTrainer(SentenceTransformerTrainer):
    """The stock trainer; rows are taken as they come, since `order` has put them into batches."""

    def get_batch_sampler(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the stock card tells of the data set's first rows and of this machine's settings."""

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        folder, model = Path(cast(str, output_dir or self.args.output_dir)), unwrapped(self.model)
        if has_adapters(cast(Transformer, model[0])):
            save_trained(model, folder / TRAINED_FILE)
        if trained := trained_projections(self.loss):
            write_projections(folder / PROJECTIONS_FILE, trained)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        """Into the model as it is: read back from its folder, a BERT has a pooler even if the trained one has none."""
        model = unwrapped(self.model)
        if has_adapters(cast(Transformer, model[0])):
            load_trained(model, Path(checkpoint_path) / TRAINED_FILE)
        else:
            read = SentenceTransformer(checkpoint_path, trust_remote_code=bool(model.trust_remote_code)).state_dict()
            model.load_state_dict({name: value for name, value in read.items() if name in model.state_dict()})
        if trained := trained_projections(self.loss):
            found = read_projections(Path(checkpoint_path) / PROJECTIONS_FILE)
            for depth, projection in trained.items():
                projection.load_state_dict(found[depth].state_dict())

    def _load_best_model(self) -> None:
        """The stock one logs it if that fails, and goes on with the last weights. The folder may have been moved."""
        if best := self.state.best_model_checkpoint:
            self._load_from_checkpoint(str(Path(cast(str, self.args.output_dir)) / Path(best).name))

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        check_finite(loss)
        super().track_loss_components(loss)


def rehearse(
    model: SentenceTransformer, options: SentenceTransformerTrainingArguments, rows: Any, loss: nn.Module
) -> None:
    """Make a `SizesTrainer` and its optimiser once.

    Raises:
        OptionError: the options are refused.
    """
    with rehearsed(options) as tried, forward_kept(model):
        SizesTrainer(model, tried, train_dataset=rows, loss=loss).create_optimizer_and_scheduler(options.max_steps)


def trained_projections(loss: Any) -> dict[int, Projection]:
    """The projections of a `StarbucksLoss` that are trained, by depth."""
    found = getattr(loss, "projections", {})
    return {int(depth): turn for depth, turn in found.items() if turn.encode.requires_grad}


class Averaged(TrainerCallback):
    """Gradients of trained projections are averaged over processes; DistributedDataParallel does the model's alone."""

    def __init__(self, projections: dict[int, Projection]):
        self.projections = projections

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        for projection in self.projections.values():
            for parameter in projection.parameters():
                gradient = cast(Tensor, parameter.grad)
                distributed.all_reduce(gradient)
                gradient /= distributed.get_world_size()


class Cleared(TrainerCallback):
    """Clears all gradients after each step, those of projections and of a loss's own weights included.

    sentence-transformers 6.0 clears the model's alone: those of the loss would add up from step to step.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        kwargs["optimizer"].zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        kwargs["optimizer"].zero_grad()


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers for as long as the block lasts: one for every checkpoint that is written."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_finite(parts: dict[str, Tensor]) -> None:
    """Raises:
    TrainingError: a part of the loss is NaN or infinite; it is named.
    """
    finite = torch.stack([value.detach().isfinite() for value in parts.values()])
    if not finite.all():
        bad = [name for name, good in zip(parts, finite.tolist(), strict=True) if not good]
        raise TrainingError(f"the loss is not finite ({', '.join(bad)})")


class ProgressCallback(TrainerCallback):
    """The progress bar with the loss of each size, the training curve, and a look at the gradients.

    Attributes:
        points: ``{"step", "loss", "6x128", "kl_6x128", ..., "mean", "6x128_mean_sts", ...}``: parts of the loss, and
            what was measured on held-out data.
        started, ended: whether there has been a step, and whether there will be no other.
    """

    def __init__(self, ladder: Ladder, steps: int, progress: bool):
        self.ladder, self.started, self.ended = ladder, False, False
        self.points: list[dict[str, float]] = []
        self.bar = progress_bar(progress)
        self.task = self.bar.add_task("training", total=steps)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.start()
        self.points = curve(state.log_history)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """A gradient that is not finite would put NaN into the weights, and into the next checkpoint."""
        if model is None or args.fp16:  # gradient scaling in fp16 meets infinities by design, and skips those steps
            return
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not torch.nn.utils.get_total_norm(gradients.values()).isfinite():
            bad = next((name for name, g in gradients.items() if not g.isfinite().all()), "their norm")
            raise TrainingError(f"the gradient is not finite ({bad})")

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = True

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.points = curve(state.log_history)
        last = next((point for point in reversed(self.points) if "loss" in point), {})
        losses = {size.name: _of_size(last, size.name) for size in self.ladder}
        shown = ", ".join(f"{name}: {value:.3f}" for name, value in losses.items() if value is not None)
        self.bar.update(self.task, description=f"training, loss {shown}" if shown else "training")


CLOCKED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What a trainer has logged, a row a step: losses by part, measurements by their own names."""
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        point = points.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        if "loss" in entry:
            other = ("step", "epoch", "grad_norm", "learning_rate")
            point |= {name: value for name, value in entry.items() if name not in other}
        for name, value in entry.items():
            if name.startswith("eval_") and name not in CLOCKED and isinstance(value, int | float):
                point[name[5:] if "mean" in name else name] = value  # others are of stock evaluators
    return [points[step] for step in sorted(points) if len(points[step]) > 1]


def _of_size(point: dict[str, float], name: str) -> float | None:
    """All parts of a size's loss together; of a pre-training, its masked words by the encoder alone."""
    parts = [value for key, value in point.items() if key in (name, f"kl_{name}", f"mlm_{name}")]
    return sum(parts) if parts else None
