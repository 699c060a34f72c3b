"""Options that go to a stock trainer: which it has, which are ours, and that it takes them. Shared by both wings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import IntervalStrategy, PrinterCallback, Trainer, TrainingArguments

from nestling.errors import NestlingError, OptionError
from nestling.jobs.schedule import INTERVALS
from nestling.options import flag, number, shown, whole

Arguments = TypeVar("Arguments", bound=TrainingArguments)
OURS = {  # under other names, or not at all
    "output_dir": "use folder",
    "per_device_train_batch_size": "use batch_size",
    "data_seed": "use seed",
    "resume_from_checkpoint": "use resume=True",
    "disable_tqdm": "use progress",
    "ignore_data_skip": "a training that is resumed goes on with the next batch",
    "restore_callback_states_from_checkpoint": "they always are",
    "label_smoothing_factor": "it is for losses of classes",
}
WHOLE = (
    "each process keeps the whole model, since layers of one that FSDP has shared out cannot be read one by one: "
    "start it with torchrun, or with accelerate launch and without FSDP"
)
OURS |= {"fsdp": WHOLE, "fsdp_config": WHOLE}
# What a stock Trainer takes beside its arguments.
OURS |= {
    "args": "give its options by name",
    "train_dataset": "it is made of what is given to be trained on",
    "data_collator": "batches are put together as the model needs them",
    "processing_class": "the model's own is used",
    "model_init": "give the model",
    "compute_loss_func": "the loss is this training's own",
    "compute_metrics": "the stock one is not used",
    "preprocess_logits_for_metrics": "the stock one is not used",
    "optimizers": "use optim, learning_rate and lr_scheduler_type",
    "optimizer_cls_and_kwargs": "use optim and optim_args",
}
# Of options whose default does not tell what they may be; None is taken too.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "gradient_accumulation_steps": whole,
    "save_total_limit": whole,
    "torch_empty_cache_steps": whole,
    "eval_accumulation_steps": whole,
    "dataloader_prefetch_factor": whole,
    "eval_delay": partial(number, minimum=0),
    "gradient_checkpointing": flag,
    "activation_checkpointing": flag,
    "tf32": flag,
    "greater_is_better": flag,
}


def check_arguments(changes: Mapping[str, Any], kind: type[TrainingArguments], ours: Mapping[str, str]) -> None:
    """Look at the options that a user gave for a stock trainer.

    Args:
        kind: the class of the trainer's arguments.
        ours: those that this training does not take, and what to do instead.

    Raises:
        OptionError: one has another name here, or none, or a value of the wrong type; the message says which. Or
            accelerate was told to shard the model, which on processors it would not do without a word.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise OptionError(f"accelerate was started with FSDP: {WHOLE}")
    if wrong := [name for name in changes if name in ours]:
        raise OptionError(f"{wrong[0]}={shown(changes[wrong[0]])} is no option of this training: {ours[wrong[0]]}")
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(changes) - set(known)):
        near = get_close_matches(unknown[0], known, 3)
        such = ", such as " * bool(near) + ", ".join(near)
        raise OptionError(f"no option {', '.join(unknown)}: expected those of {kind.__name__}{such}")
    for name, value in changes.items():
        default = known[name].default
        if name in CHECKS and value is not None:
            CHECKS[name](name, value)
        elif name in INTERVALS or name in CHECKS:
            continue  # `scheduled` looks at intervals
        elif isinstance(default, bool):
            flag(name, value)
        elif isinstance(default, float):
            number(name, value, minimum=0)
        elif isinstance(default, int):
            whole(name, value, minimum=min(0, default))


def renamed(changes: Mapping[str, Any], kind: type[TrainingArguments]) -> dict[str, Any]:
    """The changes with gradient checkpointing under the name that this version of transformers has for it."""
    if "activation_checkpointing" not in {field.name for field in fields(kind)}:
        return dict(changes)
    return {
        name.replace("gradient_checkpointing", "activation_checkpointing"): value for name, value in changes.items()
    }


@contextmanager
def refused_options() -> Iterator[None]:
    """What the stock trainer does not take is the user's option: it says so with errors of any class."""
    try:
        yield
    except (NestlingError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise OptionError(f"the stock trainer cannot be made with these options ({text})") from error


@contextmanager
def rehearsed(options: Arguments) -> Iterator[Arguments]:
    """The options for a trainer that is made, with its optimiser, only to see whether it can be.

    Its folder is thrown away behind the block.

    Raises:
        OptionError: the block raises something, as stock trainers do with options that they do not take.
    """
    with refused_options(), tempfile.TemporaryDirectory() as thrown_away:
        tried = copy(options)
        tried.hub_model_id = options.hub_model_id or Path(str(options.output_dir)).name
        tried.output_dir, tried.eval_strategy = thrown_away, IntervalStrategy.NO
        yield tried


def remove_printer(trainer: Trainer) -> None:
    """The stock callback that prints what is logged; one that the user gave stays."""
    printers = [found for found in trainer.callback_handler.callbacks if type(found) is PrinterCallback]
    trainer.remove_callback(printers[-1])


def stopped(trainer: Trainer, steps: int) -> dict[str, int]:
    """What is said of a training that a callback has stopped."""
    last = trainer.state.global_step
    return {"stopped_at": last} if last < steps else {}
