"""Train and eval mode: put back as they were, module by module, since parts of a model may be in another mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the modes within the block, every module is then in its own again."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def forward_kept(model: nn.Module) -> Iterator[None]:
    """What accelerate wraps ``forward`` into within the block (autocast, for mixed precision) is taken off again."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before


@contextmanager
def checkpointed(backbone: Any, options: TrainingArguments) -> Iterator[None]:
    """Gradient checkpointing of the backbone within the block, if the options ask for it; they do not afterwards.

    Trainers would ask the whole model, which has the method under its old name alone.
    """
    on, chosen = options.gradient_checkpointing, options.gradient_checkpointing_kwargs
    for option in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(options, option):
            setattr(options, option, False)
    name = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
    try:
        if on:
            getattr(backbone, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": chosen})
        yield
    finally:
        if on:
            getattr(backbone, f"{name}_checkpointing_disable")()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for as long as the block lasts."""
    with modes_kept(model):
        model.eval()
        yield
