"""Callbacks that a user gives to a training: which they may be, and that they go on where a checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from nestling.errors import OptionError, TrainingError
from nestling.files.reading import read_object
from nestling.options import shown


def made(callbacks: Any) -> list[TrainerCallback]:
    """The callbacks, those that are given as classes made.

    Raises:
        OptionError: one is no callback of transformers, or its class cannot be made without arguments.
    """
    given = [callbacks] if isinstance(callbacks, TrainerCallback | type) else callbacks or []
    if not isinstance(given, list | tuple):
        raise OptionError(f"callbacks={shown(callbacks)}: expected a list of TrainerCallbacks")
    return [_made(callback) for callback in given]


def _made(callback: Any) -> TrainerCallback:
    try:
        found = callback() if isinstance(callback, type) else callback
    except Exception as error:
        raise OptionError(f"callbacks: {callback.__name__}() cannot be made ({error}): give one that is") from error
    if not isinstance(found, TrainerCallback):
        raise OptionError(f"callbacks: {shown(callback)} is no TrainerCallback of transformers")
    return found


def stops_early(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether one of them stops a training by what is measured."""
    return any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)


def restore(callbacks: Sequence[TrainerCallback], checkpoint: Path | None) -> None:
    """Give the callbacks that say their state the one that they had at a checkpoint, or at the start if there is none.

    The objects stay the user's own: one that has been through a stopped training is used again.
    """
    states: dict[str, Any] = {}
    if checkpoint is not None:
        found = read_object(checkpoint / "trainer_state.json", TrainingError, finite=False)
        states = found.get("stateful_callbacks") or {}
    left = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            kept = left.get(type(callback).__name__)
            state = kept.pop(0) if kept else type(callback)(**callback.state()["args"]).state()
            for name, value in state["attributes"].items():
                setattr(callback, name, value)


def have_stopped(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether one of them had stopped the training early when its state was kept."""
    return any(
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in callbacks
    )
