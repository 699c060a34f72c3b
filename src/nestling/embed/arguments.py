"""The stock trainer's arguments: our defaults under the user's changes, and which of those are none."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from nestling.embed.evaluate import GridEvaluator
from nestling.errors import OptionError

OURS = {  # under other names, or not at all
    "output_dir": "use folder",
    "max_steps": "use steps",
    "num_train_epochs": "use epochs",
    "per_device_train_batch_size": "use batch_size",
    "per_device_eval_batch_size": "give the evaluator its batch_size",
    "warmup_steps": "use warmup, a share of the steps",
    "warmup_ratio": "use warmup, a share of the steps",
    "data_seed": "use seed",
    "resume_from_checkpoint": "use resume=True",
    "disable_tqdm": "use progress",
    "batch_sampler": "batches are put together beforehand, without a text that comes twice",
    "multi_dataset_batch_sampler": "give all rows as one list",
    "torch_compile": "layers are read with hooks, which compiled code does not run: the model stays uncompiled",
}
OURS |= {name: OURS["torch_compile"] for name in ("torch_compile_backend", "torch_compile_mode")}
# Changes that leave the result as it is, so that a training can be resumed with others.
FREE = ("logging", "dataloader", "ddp", "report_to", "run_name", "log_level", "use_cpu", "save_total_limit",
        "gradient_checkpointing", "activation_checkpointing")  # fmt: skip


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: an argument has another name here, or none; the message says which.
    """
    if wrong := [name for name in changes if name in OURS]:
        raise OptionError(f"{wrong[0]}={changes[wrong[0]]!r} is no option of this training: {OURS[wrong[0]]}")
    known = {field.name for field in fields(SentenceTransformerTrainingArguments)}
    if unknown := sorted(set(_checkpointing(changes)) - known):
        raise OptionError(f"no option {', '.join(unknown)}: expected those of SentenceTransformerTrainingArguments")


def relevant(changes: Mapping[str, Any]) -> dict[str, str]:
    """The changes that the result depends on, as texts: part of a training's identity."""
    return {name: str(value) for name, value in sorted(changes.items()) if not name.startswith(FREE)}


def training_arguments(
    work: Path, steps: int, batch: int, learning_rate: float, warmup: float, seed: int,
    evaluator: GridEvaluator | None, prompts: dict[str, str], changes: dict[str, Any],
) -> SentenceTransformerTrainingArguments:  # fmt: skip
    """Our defaults under the user's ``changes``.

    Raises:
        ValueError: a number is out of its range, or the batch cannot be shared out.
    """
    parts = processes() * changes.get("gradient_accumulation_steps", 1)
    if batch % parts:
        raise OptionError(f"batch_size={batch} must be a multiple of processes times accumulation steps, {parts}")
    if not (steps >= 1 and 0 <= warmup < 1 and math.isfinite(learning_rate) and learning_rate > 0):
        raise OptionError(
            f"steps={steps}, learning_rate={learning_rate:g} and warmup={warmup:g} must be at least 1, above 0, and "
            "a share of the steps from 0 to below 1"
        )
    often = max(1, steps // 10)
    defaults: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": batch // parts,
        "per_device_eval_batch_size": batch // parts,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": round(warmup * steps),
        "logging_steps": max(1, steps // 100),
        "save_steps": often,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": "none",
        "seed": seed,
        "prompts": prompts or None,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused where there is no accelerator
    }
    if evaluator is not None:
        defaults |= {
            "eval_strategy": "steps",
            "eval_steps": changes.get("save_steps", often),
            "eval_on_start": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{evaluator.name}{'_' * bool(evaluator.name)}mean",
            "greater_is_better": True,
        }
    return SentenceTransformerTrainingArguments(**(defaults | _checkpointing(changes)))


def _checkpointing(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes with gradient checkpointing under the name that this version of transformers has for it.

    The other kind of it, which re-enters autograd, hides the gradients of the layers between.
    """
    known = {field.name for field in fields(SentenceTransformerTrainingArguments)}
    new = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    found = {key.replace("gradient_checkpointing", new): value for key, value in changes.items()}
    return {f"{new}_kwargs": {"use_reentrant": False}, **found} if found.get(new) else found


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))
