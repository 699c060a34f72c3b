"""Training every size of an encoder at once (SRL, arXiv 2410.13230), on SentenceTransformerTrainer.

Batches are put together beforehand, so that a training that is resumed, or shared by several processes, sees the same
ones. A teacher's embeddings are computed once and mapped from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import nn

from nestling.embed.model.encode import prompts_adopted
from nestling.embed.model.layers import fit_length
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.arguments import check_changes, training_arguments, trains_unread
from nestling.embed.training.base_losses import made
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.data import Examples, order
from nestling.embed.training.held_out import evaluator_of, held_out
from nestling.embed.training.job import TrainingJob, dry_run, ladder_of, prompts_of, teacher_of
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.measures import Measures
from nestling.embed.training.result import Trained, check_places
from nestling.embed.training.run import Run, dataset
from nestling.embed.training.start import blank, chosen_start
from nestling.embed.training.trainer import rehearse
from nestling.errors import MissingExtraError, OptionError
from nestling.files.temporary import private_temporary_folder
from nestling.jobs.callbacks import made as made_callbacks
from nestling.jobs.callbacks import stops_early
from nestling.jobs.processes import processes
from nestling.jobs.schedule import scheduled
from nestling.options import shown

BATCH = 64
USUAL = {"learning_rate": 5e-5, "warmup": 0.1, "projection_rate": 5e-3, "bf16": False, "dropout": True}
OF_TEXTS = ("minutes", "texts", "exclude", "rank")
Loss = nn.Module | Callable[[SentenceTransformer], nn.Module] | str | Mapping[str, Any]


def train(
    model: SentenceTransformer,
    data: Any,
    sizes: Any = None,
    config: TrainConfig | None = None,
    *,
    projections: Mapping[int, Projection] | None = None,
    loss: Loss | None = None,
    teacher: SentenceTransformer | None = None,
    evaluator: BaseEvaluator | Sequence[BaseEvaluator] | None = None,
) -> Trained:
    """Train a sentence encoder in place, so that every size is good by itself: what `ElasticEncoder.train` does.

    Args:
        sizes: the ladder, in any form that `Ladder.parse` takes; `Ladder.default` of the model if None.
        projections: by depth, those that the encoder has.
        data, config, loss, teacher, evaluator: see `ElasticEncoder.train`, which tells the errors too.

    Returns:
        `Trained`; where a callback has stopped the training, ``info["stopped_at"]`` is its last step.
    """
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise MissingExtraError(f"training needs {package}: pip install 'nestling[train,embed]'")
    config, encoder = TrainConfig.of(config), Encoder.of(model)
    if odd := [name for name in OF_TEXTS if getattr(config, name) != getattr(TrainConfig(), name)]:
        raise OptionError(f"{', '.join(odd)}: that is of training on texts, leave it out")
    usual: dict[str, Any] = {name: value for name, value in USUAL.items() if getattr(config, name) is None}
    config = replace(config, **usual)
    callbacks = made_callbacks(config.callbacks)
    if config.resume and config.output_dir is None:
        raise OptionError("resume=True without output_dir: name the folder of the training that goes on")
    if config.output_dir is not None:
        check_places(model, config.output_dir, "training", config.resume)
    fit_length(encoder.transformer)
    inner = made(loss, model)
    examples = Examples.of(data, own_loss=inner is not None)
    changes = dict(config.arguments or {})
    check_changes(changes)
    kept = None
    if evaluator is not None or changes.get("eval_strategy") == "no":
        config = replace(config, held_out=0)
    else:
        examples, kept = held_out(examples, config.held_out)
    job = _job(encoder, examples, sizes, config, inner, teacher, projections)
    steps, batch = job.steps, job.batch
    on = {"bf16": config.bf16, "gradient_checkpointing": config.gradient_checkpointing}
    changes = {name: True for name, value in on.items() if value} | changes
    measured = evaluator is not None or kept is not None
    changes = scheduled(changes, steps, max(1, round(len(examples) / batch)), measured)
    if stops_early(callbacks) and changes["eval_strategy"] == "no":
        raise OptionError("EarlyStoppingCallback: nothing is measured, give an evaluator")
    changes = {"ddp_find_unused_parameters": trains_unread(encoder)} | changes | _rates(job)
    rate, warmup = config.learning_rate or USUAL["learning_rate"], config.warmup or 0.0
    with _checkpoints(config.output_dir) as work:
        options = training_arguments(work, steps, batch, rate, warmup, config.seed, job.prompts, changes)
        # What needs no disk is tried first, on a few rows.
        table = np.zeros((4 * len(examples.columns), 2), np.float32) if job.distils else None
        tried = job.loss(blank(job), table)
        dry_run(job, tried)
        rehearse(model, options, dataset(examples, None, torch.arange(min(4, len(examples)))), tried)
        with prompts_adopted(model, {name: job.prompts.get(name, "") for name in examples.columns}):
            measures = None
            if changes["eval_strategy"] != "no":
                measures = Measures(evaluator if kept is None else evaluator_of(job, kept), model, job.ladder)
                measures.choose(options, changes)
            rows = order(examples, batch, steps, config.seed)
            return Run(job, work, options, rows, callbacks, measures).run()


def _job(
    encoder: Encoder, examples: Examples, sizes: Any, config: TrainConfig, loss: nn.Module | None, teacher: Any,
    own: Mapping[int, Projection] | None,
) -> TrainingJob:  # fmt: skip
    """The job with everything that follows from something else: steps, batch, dropout, prompts, projections."""
    model = encoder.model
    teacher = teacher_of(teacher, config.teacher_prompts)
    start: Any = None
    if isinstance(loss, StarbucksLoss):
        if sizes is not None and ladder_of(encoder, sizes) != loss.cups:
            raise OptionError(f"a StarbucksLoss has its own sizes, {loss.cups}: give those to it, or a base loss")
        ladder, start = loss.cups, {int(depth): module for depth, module in loss.projections.items()}
    else:
        ladder = ladder_of(encoder, sizes)
        start = chosen_start(config.projection, own, ladder)
    rows = len(examples)
    batch = min(BATCH, rows) if config.batch_size is None else config.batch_size
    if not 2 * (config.arguments or {}).get("gradient_accumulation_steps", 1) <= batch <= rows:
        raise OptionError(
            f"batch_size={batch} does not fit {rows} rows: a step takes some of them, and a loss compares at least two"
        )
    epochs = 1.0 if config.epochs is None else config.epochs
    steps = max(1, round(epochs * rows / batch)) if config.steps is None else config.steps
    job = TrainingJob(
        encoder, examples, ladder, replace(config, steps=steps, epochs=None, batch_size=batch), loss,
        teacher, start, prompts_of(config.prompts, examples, model),
        prompts_of(config.prompts if teacher is None else config.teacher_prompts, examples, teacher or model),
    )  # fmt: skip
    job.check()
    if not (loss if isinstance(loss, StarbucksLoss) else config).normalize and Similarity.of(model).unit:
        warnings.warn("normalize=False trains for dot products, and exports give unit vectors", stacklevel=3)
    return job


def _rates(job: TrainingJob) -> dict[str, Any]:
    """The learning rates of what has one of its own.

    Raises:
        OptionError: the user's are no mapping.
    """
    rates = (job.config.arguments or {}).get("learning_rate_mapping") or {}
    if not isinstance(rates, Mapping):
        raise OptionError(f"learning_rate_mapping={shown(rates)}: expected rates by pattern of a parameter's name")
    if not job.trains_projections:
        return {}
    return {"learning_rate_mapping": {**rates, r"^projections\.": job.config.projection_rate}}


@contextmanager
def _checkpoints(output_dir: Path | None) -> Iterator[Path]:
    """The folder of the checkpoints: beside the result's, or one that is gone afterwards.

    Raises:
        OptionError: several processes would each have one of their own.
    """
    if output_dir is not None:
        yield output_dir.with_name(f"{output_dir.name}-checkpoints")
        return
    if processes() > 1:
        raise OptionError("several processes need one place for their checkpoints: give TrainConfig an output_dir")
    with private_temporary_folder() as folder:
        yield folder / "checkpoints"
