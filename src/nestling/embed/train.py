"""Training every cup of an encoder at once (SRL, arXiv 2410.13230), on SentenceTransformerTrainer.

Batches are put together beforehand, so that a training that is resumed, or shared by several processes, sees the same
ones. A teacher's embeddings are computed once and mapped from a file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PrinterCallback

from nestling.checkpoints import begin, run
from nestling.embed.arguments import processes, rank, training_arguments
from nestling.embed.card import trained_card
from nestling.embed.dropout import without_dropout
from nestling.embed.encode import stored_prompts
from nestling.embed.encoder import Encoder
from nestling.embed.evaluate import GridEvaluator
from nestling.embed.examples import Examples, order
from nestling.embed.files import PARTS, ROTATIONS_FILE, write_ladder, write_rotations
from nestling.embed.losses import StarbucksLoss
from nestling.embed.modes import modes_kept
from nestling.embed.plan import Plan, attempt, ladder_of, prompts_of
from nestling.embed.rotation import Rotation
from nestling.embed.start import start_rotations, turned_depths
from nestling.embed.teacher import numbered, shared_table
from nestling.embed.trainer import Averaged, CupTrainer, Watch, trained_rotations, without_bars
from nestling.errors import MissingExtraError, OptionError
from nestling.folders import write_folder
from nestling.ladder import Ladder
from nestling.progress import progress_bar

BATCH = 64
TEACHER_FILE = "teacher.npy"
Loss = nn.Module | Callable[[SentenceTransformer], nn.Module]


@dataclass(frozen=True)
class Trained:
    """What a training wrote; the model itself was trained in place.

    Attributes:
        folder: a sentence-transformers folder, with ``nestling.json``.
        ladder: the cups that were trained.
        rotations: by depth, applied to pooled vectors before they are cut; needed by exports and measurements.
        info: settings, seconds (of all runs), and ``curve``, the losses and measurements by step; as in
            ``nestling.json``.
    """

    folder: Path
    ladder: Ladder
    rotations: dict[int, Rotation] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def train(
    model: SentenceTransformer,
    data: Iterable[str] | Iterable[Mapping[str, Any]],
    cups: Ladder | str | Iterable[Any] | None = None,
    *,
    folder: str | Path,
    loss: Loss | None = None,
    teacher: SentenceTransformer | None = None,
    rotation: str | Mapping[int, Rotation] | None = "auto",
    rotation_rate: float | None = 5e-3,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int | None = None,
    mini_batch_size: int | None = None,
    learning_rate: float = 5e-5,
    warmup: float = 0.1,
    seed: int = 0,
    evaluator: GridEvaluator | None = None,
    prompts: str | Mapping[str, str] | None = None,
    teacher_prompts: str | Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    dropout: bool | None = None,
    resume: bool = False,
    progress: bool = True,
    **arguments: Any,
) -> Trained:
    """Train a sentence encoder so that every cup is good by itself, and save it.

    What is learned follows from the data:

    * pairs (`read_pairs`): MultipleNegativesRankingLoss at every cup, and small cups follow the full one;
    * scored pairs (`read_sts`): CoSENTLoss likewise;
    * texts: no labels. Every cup, the full one too, follows the similarities of the model as it was, at full size.

    Under ``torchrun`` every process calls this; the loss is the one of the global batch, as in one process.

    Args:
        model: trained in place, on its own device or the accelerator that there is.
        data: strings, or rows with the columns ``anchor, positive[, negative...]``, ``query, passage[, negative...]``
            or ``sentence1, sentence2, score``; with a ``loss`` of your own, any columns of texts and one of labels.
        cups: the ladder, in any form that `Ladder.parse` takes; `Ladder.default` of the model if None.
        folder: of the trained model, must not exist; checkpoints go beside it, into ``<folder>-checkpoints``.
        loss: a base loss of the model for `StarbucksLoss`, a function that makes one, or a whole `StarbucksLoss`.
        teacher: another sentence encoder, of any kind and width, that all cups follow, beside the loss if there are
            pairs. Its embeddings are computed once.
        rotation: what is done to the pooled vectors of the depths below the full model's before they are cut (of that
            one too, if the ladder has narrower cups of it): by default they are ``"aligned"`` with the embeddings of
            the teacher, or of the full model; ``"centred"`` and ``"pca"`` are their own principal components (see
            `rotations`); or rotations by depth; None for nothing. They are saved beside the model; exports and
            measurements are given them. A whole `StarbucksLoss` has its own.
        rotation_rate: learning rate of the rotations, which are trained like the model, as any linear maps; None: they
            stay as they are.
        steps: of the optimiser; None for ``epochs`` passes over the data.
        batch_size: rows a step, over all processes and accumulation steps; by default 64, or all rows if there are
            fewer. No text comes twice in a batch where that can be had.
        mini_batch_size: rows of pairs that are embedded at a time, with cached gradients: large batches in little
            memory.
        learning_rate, warmup: of AdamW; it falls to zero linearly, after a rise over that share of the steps.
        evaluator: measures on held-out data before, ten times during and after the training; the checkpoint with the
            best mean over the cups is kept. If it has no ladder, or no rotations, it is given those of the training.
        prompts: in front of texts, for all columns or by column. Columns that are left out have the model's own: in
            rows of ``query, passage`` its prompts for queries and for passages (`stored_prompts`), as of the E5
            family; in others the one that ``encode`` uses by itself. ``""`` turns one off.
        teacher_prompts: the same for ``teacher``.
        recipe: options of `StarbucksLoss`: ``kl, kl_weight, temperature, weights, cascade, normalize, ...``. The full
            cup weighs as much as all others together, unless ``weights`` names it. Exports end in a Normalize,
            whatever ``normalize`` was.
        dropout: whether the model's dropout is on while it is trained; by default not where texts are all there is,
            since what is followed has none, and on otherwise.
        resume: go on from the last whole checkpoint, to the result of a training that was never stopped.
        arguments: for SentenceTransformerTrainingArguments: ``bf16, gradient_checkpointing, save_steps, eval_steps,
            gradient_accumulation_steps, weight_decay, ...``; not those that have a name above, nor ``torch_compile``.

    Raises:
        ExampleError: the rows cannot be trained on (which one, and why).
        LadderError, UnsupportedEncoderError: the cups do not fit the model.
        ValueError: options that do not go together, or labels that the loss cannot use.
        TrainingError: the loss or a gradient is not finite (step and part are named), a checkpoint cannot be written,
            or the folders are another training's. The last whole checkpoint is kept.
    """
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise MissingExtraError(f"training needs {package}: pip install 'nestling[train,embed]'")
    encoder, out = Encoder.of(model), Path(folder)
    inner = loss if loss is None or isinstance(loss, nn.Module) else loss(model)
    plan = Plan(encoder, Examples.of(data, own_loss=inner is not None), inner, teacher)
    plan.check(cups, recipe, rotation, mini_batch_size, out, resume, arguments)
    if rotation_rate is not None and not (math.isfinite(rotation_rate) and rotation_rate > 0):
        raise OptionError(f"rotation_rate={rotation_rate} must be above 0, or None to leave rotations as they are")
    ladder = inner.cups if isinstance(inner, StarbucksLoss) else ladder_of(encoder, cups)
    if rotation == "auto":
        rotation = "aligned"
    if isinstance(rotation, str) and not turned_depths(ladder):
        rotation = None
    if isinstance(inner, StarbucksLoss):
        rotation = {int(depth): module for depth, module in inner.rotations.items()}  # type: ignore[misc]
    if not (inner.normalize if isinstance(inner, StarbucksLoss) else (recipe or {}).get("normalize", True)):
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
    changes = dict(arguments)
    if rotation and rotation_rate is not None:
        rates = arguments.get("learning_rate_mapping") or {}
        changes["learning_rate_mapping"] = {**rates, r"^rotations\.": rotation_rate}
    options = training_arguments(work, steps, batch, learning_rate, warmup, seed, evaluator, texts, changes)
    noisy = plan.examples.kind != "texts" if dropout is None else dropout
    job = plan.job(
        ladder, steps, batch, learning_rate, warmup, seed, texts, by, recipe, rotation, mini_batch_size, arguments
    )
    job |= {"dropout": noisy, "rotation_rate": rotation_rate}
    # From here on the disk is written to. First what needs no disk is tried, on a few rows.
    table = np.zeros((4 * len(plan.examples.columns), 2), np.float32) if plan.distils else None
    attempt(plan.loss(ladder, recipe, mini_batch_size, {}, table), plan.examples, plan.distils, texts)
    checkpoint = begin(work, job, resume)
    numbers = None
    with options.main_process_first(local=False, desc="clean"):
        if not resume and rank() == 0:
            for left in work.glob("teacher*.npy"):  # by a training that was stopped before its first checkpoint
                left.unlink()
    taught = None
    if plan.distils:
        entries, numbers = numbered(plan.examples.columns, by)
        table = _table(work / TEACHER_FILE, teacher or model, entries, progress)
        taught = torch.from_numpy(table)
    with options.main_process_first(local=False, desc="start"):
        kept, written = work / ROTATIONS_FILE, resume or rank() > 0  # the first process writes them
        start = start_rotations(model, rotation, ladder, plan.examples, texts, kept, written, taught, numbers)
    for module in start.values():  # copies: those of a user's own loss are as the user left them
        module.requires_grad_(rotation_rate is not None)
    srl = plan.loss(ladder, recipe, mini_batch_size, start, table)
    turns: dict[int, Any] = {int(depth): module for depth, module in srl.rotations.items()}
    measures = _measures(evaluator, ladder, turns)
    watch = Watch(ladder, steps, progress)
    try:
        trainer = CupTrainer(
            model, options, train_dataset=_dataset(plan.examples, numbers, order(plan.examples, batch, steps, seed)),
            loss=srl, evaluator=measures, callbacks=[watch, Averaged(trained_rotations(srl))],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        with modes_kept(model), without_bars(), without_dropout(model, off=not noisy):
            seconds = run(trainer, work, checkpoint)
    finally:
        watch.bar.stop()
        if options.gradient_checkpointing:
            _without_checkpointing(model)
    srl.rotations.requires_grad_(False)
    info = _info(job, trainer, watch, seconds)
    trained = Trained(out, ladder, turns, info)
    if trainer.is_world_process_zero():
        save(model, trained, "training", trained_card(model, ladder, info, turns), resume)
    trainer.accelerator.wait_for_everyone()
    return trained


def _table(path: Path, teacher: SentenceTransformer, entries: list[tuple[str, str]], progress: bool) -> np.ndarray:
    """The teacher's embeddings, from the file if this training has written them already."""
    with progress_bar(progress and rank() == 0) as bar:
        task = bar.add_task("embedding by the teacher", total=len(entries[:: processes()]))
        shared_table(path, teacher, entries, rank(), processes(), lambda count: bar.advance(task, count))
    return np.load(path, mmap_mode="c")


def _measures(evaluator: GridEvaluator | None, ladder: Ladder, start: dict[int, Rotation]) -> GridEvaluator | None:
    """The user's evaluator with this training's cups and rotations, if it has none."""
    if evaluator is None:
        return None
    found = copy(evaluator)
    found.ladder = evaluator.ladder or ladder
    if evaluator.rotations is None:
        found.rotations = start
    return found


def _dataset(examples: Examples, numbers: Tensor | None, rows: Tensor):
    """The rows in the order of the batches, as a `datasets.Dataset`."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = dict(examples.columns)
    if numbers is not None:
        columns["label"] = numbers.tolist()
    elif examples.labels is not None:
        columns["label"] = examples.labels
    return Dataset.from_dict(columns).select(rows.tolist())


def _without_checkpointing(model: SentenceTransformer) -> None:
    """The backbone as it was; the name of the method differs between versions of transformers."""
    backbone: Any = Encoder.of(model).backbone
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
        if hasattr(backbone, name):
            return getattr(backbone, name)()


def _info(job: dict[str, Any], trainer: CupTrainer, watch: Watch, seconds: float) -> dict[str, Any]:
    """What ``nestling.json`` says of the training."""
    left_out = ("model", "pooling", "cups", "data", "teacher")
    kept = {key: value for key, value in job.items() if key not in left_out}
    best = trainer.state.best_model_checkpoint
    chosen = {} if best is None else {"best_step": int(best.rsplit("-", 1)[-1]), "best": trainer.state.best_metric}
    taught = {"teacher": job["teacher"] is not None}
    return {**kept, **taught, "seconds": round(seconds), **chosen, "curve": watch.points}


def save(model: SentenceTransformer, trained: Trained, name: str, card: str, resumed: bool = False) -> None:
    """Write the folder, whole or not at all.

    Args:
        name: of ``trained.info`` in ``nestling.json``.
        card: the model card.
        resumed: the folder may be there, as the training's result, whose files are replaced.
    """

    def fill(new: Path) -> None:
        with without_bars():
            Encoder.of(model).model.save_pretrained(str(new), create_model_card=False)
        named = {"rotations": ROTATIONS_FILE} if trained.rotations else {}
        if trained.rotations:
            write_rotations(new / ROTATIONS_FILE, trained.rotations)
        write_ladder(new, trained.ladder.to_json() | named | {name: trained.info})
        (new / "README.md").write_text(card, "utf-8")

    write_folder(trained.folder, fill, over=PARTS if resumed else None)
