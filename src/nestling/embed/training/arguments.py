"""The stock trainer's arguments: our defaults under the user's changes, and which of those are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from nestling.embed.model.parts import Encoder
from nestling.errors import OptionError
from nestling.jobs import arguments
from nestling.jobs.arguments import check_arguments, refused_options, renamed
from nestling.jobs.processes import processes

OURS = arguments.OURS | {  # under other names, or not at all
    "max_steps": "use steps",
    "num_train_epochs": "use epochs",
    "per_device_eval_batch_size": "give the evaluator its batch_size",
    "warmup_steps": "use warmup, a share of the steps",
    "warmup_ratio": "use warmup, a share of the steps",
    "auto_find_batch_size": "use batch_size, and mini_batch_size to take less memory",
    "train_sampling_strategy": "batches are put together beforehand, of texts of like length",
    "label_names": "labels are the column called label or score",
    "neftune_noise_alpha": "the stock trainer has it for language models alone",
    "eval_dataset": "give an evaluator, which measures every size",
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
    OptionError: see `check_arguments`.
    """
    check_arguments(changes, SentenceTransformerTrainingArguments, OURS)


def relevant(changes: Mapping[str, Any]) -> dict[str, str]:
    """The changes that the result depends on, as texts: part of a training's identity."""
    return {name: str(value) for name, value in sorted(changes.items()) if not name.startswith(FREE)}


def training_arguments(
    work: Path,
    steps: int,
    batch: int,
    learning_rate: float,
    warmup: float,
    seed: int,
    prompts: dict[str, str],
    changes: Mapping[str, Any],
) -> SentenceTransformerTrainingArguments:
    """Our defaults under the user's ``changes``, which have been through `scheduled`.

    Raises:
        OptionError: the batch cannot be shared out, or the stock trainer refuses an option.
    """
    parts = processes() * changes.get("gradient_accumulation_steps", 1)
    if batch % parts:
        raise OptionError(f"batch_size={batch} must be a multiple of processes times accumulation steps, {parts}")
    defaults: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": batch // parts,
        "per_device_eval_batch_size": batch // parts,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": round(warmup * steps),
        "logging_steps": max(1, steps // 100),
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": "none",
        "seed": seed,
        "prompts": prompts or None,
        "dataloader_drop_last": processes() > 1,  # as the stock trainer has it, which says so
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused where there is no accelerator
    }
    with refused_options():
        return SentenceTransformerTrainingArguments(**(defaults | _checkpointing(changes)))


def _checkpointing(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes under today's names, with the kind of checkpointing that shows the gradients of layers between.

    The other kind re-enters autograd.
    """
    found = renamed(changes, SentenceTransformerTrainingArguments)
    on = next((name for name in ("activation_checkpointing", "gradient_checkpointing") if found.get(name)), None)
    return {f"{on}_kwargs": {"use_reentrant": False}, **found} if on else found


def trains_unread(encoder: Encoder) -> bool:
    """Whether some weights that are trained are read by nothing: those of BERT's pooler. DDP has to look for them."""
    pooler = getattr(encoder.backbone, "pooler", None)
    return pooler is not None and any(parameter.requires_grad for parameter in pooler.parameters())
