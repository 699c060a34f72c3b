"""Options of a training of bases: the recipe, and what goes to the stock trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from nestling.errors import OptionError
from nestling.jobs import arguments
from nestling.jobs.arguments import check_arguments, refused_options, rehearsed, renamed
from nestling.jobs.schedule import scheduled
from nestling.kv.calibration.moments import BASES
from nestling.kv.training.sampling import SAMPLINGS
from nestling.options import choice, number, shown, text, whole

OURS = arguments.OURS | {  # under other names, or not at all
    "num_train_epochs": "use tokens",
    "per_device_eval_batch_size": "use batch_size",
    "learning_rate": "use recipe={'learning_rate': ...}",
    "auto_find_batch_size": "use batch_size, and gradient_accumulation_steps to take less memory",
    "train_sampling_strategy": "the order of the texts is drawn beforehand, from the seed",
    "label_names": "there is a loss without labels",
    "prediction_loss_only": "nothing else is predicted",
    "remove_unused_columns": "all columns are used",
    "neftune_noise_alpha": "the model is frozen",
    "load_best_model_at_end": "the last step is kept",
    "metric_for_best_model": "the last step is kept",
    "greater_is_better": "the last step is kept",
    "eval_dataset": "use eval_texts",
}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        basis: of the calibration to start from, if no adapter is given.
        sampling: see `nestling.kv.training.sampling.schedule`.
        allocation: of the ranks that are sampled and evaluated, ``"energy"`` or ``"uniform"``.
        kl_weight, ce_weight: of the distance to the full model and of the text's next tokens.
        learning_rate: of AdamW, cosine to zero after a short warm-up.
        sinks, window: exact tokens, as the cache will keep them.
    """

    basis: str = "balanced"
    sampling: str = "path"
    allocation: str = "energy"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    learning_rate: float = 2e-3
    sinks: int = 4
    window: int = 64


RECIPES = {
    "default": Recipe(),
    "paper": Recipe(
        basis="pca",
        sampling="independent",
        allocation="uniform",
        kl_weight=0.25,
        ce_weight=0.75,
        learning_rate=1e-3,
        sinks=0,
        window=0,
    ),
}

CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "basis": lambda name, value: choice(name, value, BASES),
    "sampling": lambda name, value: choice(name, value, SAMPLINGS),
    "allocation": text,
    "kl_weight": partial(number, minimum=0),
    "ce_weight": partial(number, minimum=0),
    "learning_rate": partial(number, above=0),
    "sinks": partial(whole, minimum=0),
    "window": partial(whole, minimum=0),
}


def recipe_of(preset: str, changes: Mapping[str, Any] | None) -> Recipe:
    """A preset with changes.

    Raises:
        OptionError: there is no such preset, or a change is unknown or out of range.
    """
    if preset not in RECIPES:
        raise OptionError(f"preset must be one of {', '.join(RECIPES)}, got {shown(preset)}")
    if not isinstance(changes, Mapping | None):
        raise OptionError(f"recipe={shown(changes)}: expected options by name")
    known = [field.name for field in fields(Recipe)]
    if unknown := [str(name) for name in changes or {} if name not in known]:
        raise OptionError(f"recipe has no {', '.join(unknown)}: expected some of {', '.join(known)}")
    found = replace(RECIPES[preset], **{name: CHECKS[name](name, value) for name, value in (changes or {}).items()})
    if not found.kl_weight + found.ce_weight:
        raise OptionError("kl_weight=0 and ce_weight=0: nothing is left to learn from")
    return found


def training_arguments(
    folder: Path, steps: int, epoch: int, batch_size: int, recipe: Recipe, seed: int, evaluates: bool, changes: dict
) -> TrainingArguments:
    """`TrainingArguments`: our defaults under the user's ``changes``.

    Args:
        epoch: steps of one pass over the texts.
        evaluates: whether there is held-out text.

    Raises:
        OptionError: an option is unknown, ours, or out of range, two do not go together, or the trainer refuses one.
    """
    check_arguments(changes, TrainingArguments, OURS)
    changes = renamed(changes, TrainingArguments)
    whole("max_steps", changes.get("max_steps", steps))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    parts = processes * changes.get("gradient_accumulation_steps", 1)
    if batch_size % parts:
        raise OptionError(f"batch_size={batch_size} must be a multiple of processes times accumulation steps, {parts}")
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size // parts,
        "per_device_eval_batch_size": batch_size // parts,
        "max_steps": steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, steps // 20),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, steps // 100),
        "prediction_loss_only": True,
        "label_names": ["input_ids"],  # there is a loss without labels
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",  # the order is the data's own
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": "none",
        "seed": seed,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused where there is no accelerator
    }
    often = {"save_steps": max(1, min(50, steps // 10)), "load_best_model_at_end": False}
    often |= {"eval_steps": max(1, steps // 10)} if evaluates else {}
    with refused_options():
        options = TrainingArguments(**(defaults | scheduled(often | changes, steps, epoch, evaluates, "eval_texts")))
    with rehearsed(options) as tried:
        Trainer(nn.Linear(1, 1), tried).create_optimizer_and_scheduler(steps)
    return options
