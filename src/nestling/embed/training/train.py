"""Training every cup of an encoder at once (SRL, arXiv 2410.13230), on SentenceTransformerTrainer.

Batches are put together beforehand, so that a training that is resumed, or shared by several processes, sees the same
ones. A teacher's embeddings are computed once and mapped from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import nn
from transformers import TrainerCallback

from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import prompts_adopted, stored_prompts
from nestling.embed.model.layers import fit_length
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.arguments import checked, training_arguments
from nestling.embed.training.base_losses import made
from nestling.embed.training.data import Examples, order
from nestling.embed.training.job import Plan, attempt, ladder_of, prompts_of
from nestling.embed.training.loss import StarbucksLoss, checked_recipe
from nestling.embed.training.measures import Measures
from nestling.embed.training.result import Trained, check_places
from nestling.embed.training.run import Job, dataset
from nestling.embed.training.start import blank, own_start, turned_depths
from nestling.embed.training.trainer import rehearse
from nestling.errors import MissingExtraError, OptionError
from nestling.jobs.callbacks import made as made_callbacks
from nestling.jobs.callbacks import stops_early
from nestling.jobs.schedule import scheduled
from nestling.options import flag, path, shown

BATCH = 64
Loss = nn.Module | Callable[[SentenceTransformer], nn.Module] | str | Mapping[str, Any]


def train(
    model: SentenceTransformer,
    data: Any,
    cups: Ladder | str | Iterable[Any] | None = None,
    *,
    folder: str | Path,
    loss: Loss | None = None,
    teacher: SentenceTransformer | None = None,
    projection: str | Mapping[int, Projection] | None = "auto",
    projection_rate: float | None = 5e-3,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int | None = None,
    mini_batch_size: int | None = None,
    learning_rate: float = 5e-5,
    warmup: float = 0.1,
    seed: int = 0,
    evaluator: BaseEvaluator | Sequence[BaseEvaluator] | None = None,
    prompts: str | Mapping[str, str] | None = None,
    teacher_prompts: str | Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    dropout: bool | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    resume: bool = False,
    progress: bool = True,
    **arguments: Any,
) -> Trained:
    """Train a sentence encoder so that every cup is good by itself, and save it.

    A training that is stopped by an error or an interrupt puts the model back as it was; ``resume=True`` goes on from
    the last checkpoint, with the same objects or, in another process, with new ones.

    What is learned follows from the data:

    * pairs (`read_pairs`): MultipleNegativesRankingLoss at every cup, and small cups follow the full one;
    * scored pairs (`read_sts`): CoSENTLoss likewise;
    * texts: no labels. Every cup, the full one too, follows the similarities of the model as it was, at full size.

    Under ``torchrun`` every process calls this; the loss is the one of the global batch, as in one process.

    Args:
        model: trained in place, on its own device or the accelerator that there is. Texts are cut to the positions
            that it has.
        data: strings, or rows with the columns ``anchor, positive[, negative...]``, ``query, passage[, negative...]``,
            ``sentence1, sentence2, score``, ``text``, or another form of `read_pairs`; with a ``loss`` of your own,
            any columns of texts and one of labels. In a list, a data frame, a data set or any other iterable. What is
            left out of them is counted in the result's ``info["left_out"]``.
        cups: the ladder, in any form that `Ladder.parse` takes; `Ladder.default` of the model if None.
        folder: of the trained model, must not exist; checkpoints go beside it, into ``<folder>-checkpoints``.
        loss: a base loss of the model for `StarbucksLoss`, its class or the name of that, a function that makes one,
            or a whole `StarbucksLoss`.
        teacher: another sentence encoder, of any kind and width, that all cups follow, beside the loss if there are
            pairs. Its embeddings are computed once.
        projection: what is done to the pooled vectors of the depths below the full model's before they are cut
            (of that one too, if the ladder has narrower cups of it): by default they are those that the model was
            trained with before, or ``"aligned"`` with the embeddings of the teacher, or of the full model;
            ``"centred"`` and ``"pca"`` are their own principal components (see `fit_projections`); or projections by
            depth; None for none. They are saved beside the model, which remembers them: exports and measurements use
            them. A whole `StarbucksLoss` has its own.
        projection_rate: learning rate of the projections, which are trained like the model, as any linear maps; None:
            they stay as they are.
        steps: of the optimiser; None for ``epochs`` passes over the data.
        batch_size: rows a step, over all processes and accumulation steps; by default 64, or all rows if there are
            fewer. No text comes twice in a batch where that can be had.
        mini_batch_size: rows of pairs that are embedded at a time, with cached gradients: large batches in little
            memory.
        learning_rate, warmup: of AdamW; it falls to zero linearly, after a rise over that share of the steps.
        evaluator: measures on held-out data before, ten times during and after the training; the checkpoint with the
            best mean over the cups is kept. If it has no ladder, or no projections, it is given those of the training.
            Evaluators of sentence-transformers measure the full model; of a list the last one counts.
        prompts: in front of texts, for all columns or by column. Columns that are left out have the model's own: in
            rows of ``query, passage`` its prompts for queries and for passages (`stored_prompts`), as of the E5
            family; in others the one that ``encode`` uses by itself. ``""`` turns one off. They become the model's
            own: of queries and passages, or of ``encode``, so that it is measured and served with them.
        teacher_prompts: the same for ``teacher``.
        recipe: options of `StarbucksLoss`: ``kl_weight, temperature, weights, cascade, normalize, ...``. The full
            cup weighs as much as all others together, unless ``weights`` names it. Exports of a model that compares by
            cosine end in a Normalize, whatever ``normalize`` was; models of dot products or distances need a loss of
            your own, and ``normalize=False``.
        dropout: whether the model's dropout is on while it is trained; by default not where texts are all there is,
            since what is followed has none, and on otherwise.
        callbacks: of transformers, as objects or classes. Those that say their state (EarlyStoppingCallback, or your
            own with ``ExportableState``) go on with it when a training is resumed.
        resume: go on from the last whole checkpoint, to the result of a training that was never stopped.
        arguments: for SentenceTransformerTrainingArguments: ``bf16, gradient_checkpointing, save_steps, eval_steps,
            save_strategy, metric_for_best_model, gradient_accumulation_steps, weight_decay, ...``; not those that
            have a name above, nor ``torch_compile``. An epoch is one pass over the data.

    Returns:
        `Trained`; where a callback has stopped the training, ``info["stopped_at"]`` is its last step.

    Raises:
        ExampleError: the rows cannot be trained on (which one, and why).
        LadderError, UnsupportedEncoderError: the cups do not fit the model.
        OptionError: an option is out of range or unknown, or two do not go together. Like all of the above it is
            raised before anything is computed or written.
        EvaluationError: the evaluator cannot measure this model.
        TrainingError: the loss or a gradient is not finite (step and part are named), a checkpoint cannot be written,
            or the folders are another training's. The last whole checkpoint is kept.
    """
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise MissingExtraError(f"training needs {package}: pip install 'nestling[train,embed]'")
    steps, epochs, batch_size, mini_batch_size = checked(
        steps=steps, epochs=epochs, batch_size=batch_size, mini_batch_size=mini_batch_size
    )
    learning_rate, projection_rate, warmup, seed = checked(
        learning_rate=learning_rate, projection_rate=projection_rate, warmup=warmup, seed=seed
    )
    for name, value in {"resume": resume, "progress": progress, "dropout": dropout or False}.items():
        flag(name, value)
    encoder, out, own = Encoder.of(model), path("folder", folder), made_callbacks(callbacks)
    check_places(model, out, "training", resume)
    fit_length(encoder.transformer)
    inner, recipe = made(loss, model), None if recipe is None else checked_recipe(recipe)
    plan = Plan(encoder, Examples.of(data, own_loss=inner is not None), inner, teacher)
    plan.check(cups, recipe, projection, mini_batch_size, arguments)
    ladder = inner.cups if isinstance(inner, StarbucksLoss) else ladder_of(encoder, cups)
    if projection == "auto":
        projection = own_start(model, ladder) or "aligned"
    if isinstance(projection, str) and not turned_depths(ladder):
        projection = None
    if isinstance(inner, StarbucksLoss):
        projection = {int(depth): module for depth, module in inner.projections.items()}  # type: ignore[misc]
    if not (inner.normalize if isinstance(inner, StarbucksLoss) else (recipe or {}).get("normalize", True)):
        if Similarity.of(encoder.model).unit:
            warnings.warn("normalize=False trains for dot products, and exports give unit vectors", stacklevel=2)
    rows = len(plan.examples)
    batch = min(BATCH, rows) if batch_size is None else batch_size
    if not 2 * arguments.get("gradient_accumulation_steps", 1) <= batch <= rows:
        raise OptionError(
            f"batch_size={batch} does not fit {rows} rows: a step takes some of them, and a loss compares at least two"
        )
    steps = max(1, round(epochs * rows / batch)) if steps is None else steps
    work = out.with_name(f"{out.name}-checkpoints")
    texts = by = prompts_of(prompts, plan.examples, stored_prompts(model))
    if teacher is None and teacher_prompts:
        raise OptionError(f"teacher_prompts={teacher_prompts!r} without a teacher: give one, or use prompts")
    if teacher is not None:
        by = prompts_of(teacher_prompts, plan.examples, stored_prompts(teacher))
    changes = scheduled(arguments, steps, max(1, round(rows / batch)), evaluator is not None)
    if stops_early(own) and changes["eval_strategy"] == "no":
        raise OptionError("EarlyStoppingCallback: nothing is measured, give an evaluator")
    rates = arguments.get("learning_rate_mapping") or {}
    if not isinstance(rates, Mapping):
        raise OptionError(f"learning_rate_mapping={shown(rates)}: expected rates by pattern of a parameter's name")
    if projection and projection_rate is not None:
        changes["learning_rate_mapping"] = {**rates, r"^projections\.": projection_rate}
    options = training_arguments(work, steps, batch, learning_rate, warmup, seed, texts, changes)
    noisy = plan.examples.kind != "texts" if dropout is None else dropout
    job = plan.job(
        ladder, steps, batch, learning_rate, warmup, seed, texts, by, recipe, projection, mini_batch_size, arguments
    )
    job |= {"dropout": noisy, "projection_rate": projection_rate}
    # What needs no disk is tried first, on a few rows.
    table = np.zeros((4 * len(plan.examples.columns), 2), np.float32) if plan.distils else None
    tried = plan.loss(ladder, recipe, mini_batch_size, blank(projection, ladder, projection_rate is not None), table)
    attempt(tried, plan.examples, plan.distils, texts)
    rehearse(model, options, dataset(plan.examples, None, torch.arange(min(4, rows))), tried)
    with prompts_adopted(model, {name: texts.get(name, "") for name in plan.examples.columns}):
        measures = None
        if changes["eval_strategy"] != "no":
            measures = Measures(evaluator, model, ladder)
            measures.choose(options, changes)
        return Job(
            model=model, plan=plan, ladder=ladder, recipe=recipe,
            projection=projection, projection_rate=projection_rate, mini_batch_size=mini_batch_size, out=out,
            work=work, options=options, rows=order(plan.examples, batch, steps, seed), prompts=texts,
            teacher_prompts=by, dropout=noisy, callbacks=own, measures=measures, identity=job, progress=progress,
        ).run(resume)  # fmt: skip
