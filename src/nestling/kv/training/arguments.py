"""What of the options of a training of bases goes to the stock trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from nestling.errors import OptionError
from nestling.jobs import arguments
from nestling.jobs.arguments import check_arguments, refused_options, rehearsed, renamed
from nestling.jobs.processes import processes
from nestling.jobs.schedule import scheduled
from nestling.kv.training.config import TrainConfig
from nestling.options import whole

OURS = arguments.OURS | {  # under other names, or not at all
    "num_train_epochs": "use tokens",
    "per_device_eval_batch_size": "use batch_size",
    **dict.fromkeys(
        ("output_dir", "learning_rate", "seed", "bf16", "gradient_checkpointing"),
        "it is a field of TrainConfig itself",
    ),
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


def training_arguments(config: TrainConfig, steps: int, epoch: int, evaluates: bool) -> TrainingArguments:
    """`TrainingArguments`: our defaults under the user's ``config.arguments``.

    Args:
        epoch: steps of one pass over the texts.
        evaluates: whether there is held-out text.

    Raises:
        OptionError: an option is unknown, ours, or out of range, two do not go together, or the trainer refuses one.
    """
    check_arguments(config.arguments, TrainingArguments, OURS)
    own = {"bf16": config.bf16, "gradient_checkpointing": config.gradient_checkpointing}
    changes, batch_size = renamed({**own, **config.arguments}, TrainingArguments), config.batch_size
    whole("max_steps", changes.get("max_steps", steps))
    parts = processes() * changes.get("gradient_accumulation_steps", 1)
    if batch_size % parts:
        raise OptionError(f"batch_size={batch_size} must be a multiple of processes times accumulation steps, {parts}")
    defaults: dict[str, Any] = {
        "output_dir": str(config.output_dir),
        "per_device_train_batch_size": batch_size // parts,
        "per_device_eval_batch_size": batch_size // parts,
        "max_steps": steps,
        "learning_rate": config.learning_rate,
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
        "seed": config.seed,
        "ddp_find_unused_parameters": False,  # all that is trained is read at every rank
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
