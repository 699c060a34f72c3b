"""When a training saves and measures, and which checkpoint it keeps: options of the trainer, any of them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nestling.errors import OptionError
from nestling.options import choice, number, shown, whole

STRATEGIES = {"save": ("no", "steps", "epoch", "best"), "eval": ("no", "steps", "epoch"),
              "logging": ("no", "steps", "epoch")}  # fmt: skip
INTERVALS = [f"{kind}_{what}" for kind in STRATEGIES for what in ("strategy", "steps")]
MEASURED = ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")


def scheduled(
    changes: Mapping[str, Any], steps: int, epoch: int | None, measured: bool, by: str = "an evaluator"
) -> dict[str, Any]:
    """The user's changes with what follows from them, every interval in steps.

    What is measured is measured where checkpoints are written, ten times unless something else is asked for, and the
    best checkpoint is kept. Intervals of saving and of measuring follow each other where one is given.

    Args:
        steps: of the training.
        epoch: steps of one pass over the data; None where there are no passes.
        measured: whether there is something to measure with.
        by: what it is called, for messages.

    Raises:
        OptionError: an option is out of range, or two do not go together.
    """
    found = {name: value for name, value in changes.items() if value is not None or name not in INTERVALS}
    often = max(1, steps // 10)
    for kind in STRATEGIES:
        found |= _in_steps(kind, found, steps, epoch)
    if not measured and (lost := [name for name in MEASURED if found.get(name) not in (None, False, "no")]):
        raise OptionError(f"{lost[0]}={shown(changes[lost[0]])}: there is nothing to measure with, give {by}")
    measures = measured and found.get("eval_strategy") != "no"
    saves = found.setdefault("save_strategy", "steps")
    if measures:
        found["eval_strategy"] = "steps"
        found.setdefault("eval_steps", found.get("save_steps", often) if saves == "steps" else often)
        found.setdefault("eval_on_start", True)
        found.setdefault("load_best_model_at_end", saves != "no")
    else:
        found["eval_strategy"] = "no"
    if saves == "steps":
        found.setdefault("save_steps", found["eval_steps"] if measures else often)
    _check_best(found, measures, by)
    return found


def _in_steps(kind: str, changes: Mapping[str, Any], steps: int, epoch: int | None) -> dict[str, Any]:
    """The strategy and the interval of one kind, where they were given: passes over the data are so many steps."""
    found: dict[str, Any] = {}
    strategy, interval = changes.get(f"{kind}_strategy"), changes.get(f"{kind}_steps")
    if strategy is not None:
        name = getattr(strategy, "value", strategy)  # of transformers' own enumerations
        found[f"{kind}_strategy"] = choice(f"{kind}_strategy", name, STRATEGIES[kind])
    if interval is not None:
        found[f"{kind}_steps"] = _interval(f"{kind}_steps", interval, steps)
    if found.get(f"{kind}_strategy") == "epoch":
        if epoch is None:
            raise OptionError(f"{kind}_strategy='epoch': the texts are read as a stream, give {kind}_steps")
        found = {f"{kind}_strategy": "steps", f"{kind}_steps": epoch}
    return found


def _interval(name: str, value: Any, steps: int) -> int:
    """A number of steps; below 1 it is a share of all, as in transformers."""
    if 0 < number(name, value, above=0) < 1:
        return math.ceil(number(name, value) * steps)
    return whole(name, value)


def _check_best(found: Mapping[str, Any], measures: bool, by: str) -> None:
    saves, best = found["save_strategy"], found.get("load_best_model_at_end")
    if (best or saves == "best") and not measures:
        what = "save_strategy='best'" if saves == "best" else f"load_best_model_at_end={best}"
        raise OptionError(f"{what}: nothing is measured, give {by}, and leave out eval_strategy='no'")
    if best and saves == "no":
        raise OptionError(
            f"load_best_model_at_end={best} and save_strategy='no': the best can only be kept where something is saved"
        )
    if best and saves == "steps" and found["save_steps"] % found["eval_steps"]:
        raise OptionError(
            f"save_steps={found['save_steps']} is no multiple of eval_steps={found['eval_steps']}: the best can only "
            "be kept where it is saved; give one of the two, or load_best_model_at_end=False"
        )
