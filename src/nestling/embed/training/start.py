"""The projections that a training starts from, kept beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.embed.ladder import Ladder
from nestling.embed.model.folder import read_projections, write_projections
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.training.job import TrainingJob

SAMPLE = 10_000  # texts that projections are taken from


def projected_depths(ladder: Ladder) -> list[int]:
    """The depths that have a projection. The full model's has none, unless narrower sizes share its depth."""
    full = ladder.full
    return sorted({size.layers for size in ladder if size.layers < full.layers or size.dims < full.dims})


def blank(job: TrainingJob) -> dict[int, Projection]:
    """Projections of the same shape as those that were asked for, to try a loss with."""
    if isinstance(job.projections, Mapping):
        found = {depth: deepcopy(module) for depth, module in job.projections.items()}
    else:
        depths = projected_depths(job.ladder) if job.projections else ()
        found = {depth: Projection(torch.eye(job.ladder.full.dims)) for depth in depths}
    for module in found.values():
        module.requires_grad_(job.trains_projections)
    return found


def chosen_start(
    kind: str, own: Mapping[int, Projection] | None, ladder: Ladder
) -> str | dict[int, Projection] | None:
    """What small sizes start from: ``"auto"`` is the encoder's own projections, if they are all that is needed."""
    if kind == "auto":
        fitting = {depth: turn for depth, turn in (own or {}).items() if depth in ladder.layers}
        fit = all(turn.encode.shape[0] == ladder.full.dims for turn in fitting.values())
        if fitting and fit and set(projected_depths(ladder)) <= fitting.keys():
            return fitting
        kind = "aligned"
    return None if kind == "none" or not projected_depths(ladder) else kind


def start_projections(
    job: TrainingJob, path: Path, written: bool, teacher: Tensor | None = None, numbers: Tensor | None = None
) -> dict[int, Projection]:
    """Copies of the projections that were asked for.

    Args:
        path: a file that they are written to.
        written: read it, if it exists: a training that goes on, or another process of one, must not find others.
        teacher, numbers: embeddings by a teacher, and which of them the texts have, ``[rows, columns]``.
    """
    start = job.projections
    if not start:
        return {}
    if written and path.is_file():
        return read_projections(path)
    if isinstance(start, str):
        columns = job.examples.columns
        every = [(job.prompts.get(name, ""), text) for name, column in columns.items() for text in column]
        places = {prompt + text: place for place, (prompt, text) in enumerate(every)}
        few = list(places)[:: -(-len(places) // SAMPLE)]
        asked = [every[places[text]][0] for text in few]
        target = None
        if teacher is not None and numbers is not None:
            target = teacher[numbers.T.flatten()[torch.tensor([places[text] for text in few])]]
        kind: Any = start
        start = fit_projections(
            job.encoder.outer, few, projected_depths(job.ladder), kind=kind, target=target, prompts=asked,
        )  # fmt: skip
    write_projections(path, start)
    return read_projections(path)
