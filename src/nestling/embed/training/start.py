"""The projections that a training starts from, kept beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from nestling.embed.ladder import Ladder
from nestling.embed.model.folder import read_projections, write_projections
from nestling.embed.model.own import own_projections
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.training.data import Examples

SAMPLE = 10_000  # texts that projections are taken from


def turned_depths(ladder: Ladder) -> list[int]:
    """The depths that have a projection. The full model's has none, unless narrower cups share its depth."""
    full = ladder.full
    return sorted({cup.layers for cup in ladder if cup.layers < full.layers or cup.dims < full.dims})


def blank(projection: str | Mapping[int, Projection] | None, ladder: Ladder, trained: bool) -> dict[int, Projection]:
    """Projections of the same shape as those that were asked for, to try a loss with."""
    if isinstance(projection, Mapping):
        found = {depth: deepcopy(module) for depth, module in projection.items()}
    else:
        found = {
            depth: Projection(torch.eye(ladder.full.dims)) for depth in (turned_depths(ladder) if projection else ())
        }
    for module in found.values():
        module.requires_grad_(trained)
    return found


def own_start(model: SentenceTransformer, ladder: Ladder) -> dict[int, Projection]:
    """The projections that a model was trained with before, if they are all that a ladder needs; else none."""
    own = {depth: turn for depth, turn in own_projections(model).items() if depth in ladder.layers}
    fit = all(turn.encode.shape[0] == ladder.full.dims for turn in own.values())
    return own if fit and set(turned_depths(ladder)) <= own.keys() else {}


def start_projections(
    model: SentenceTransformer,
    projection: str | Mapping[int, Projection] | None,
    ladder: Ladder,
    examples: Examples,
    prompts: Mapping[str, str],
    path: Path,
    written: bool,
    teacher: Tensor | None = None,
    numbers: Tensor | None = None,
) -> dict[int, Projection]:
    """Copies of the projections that were asked for.

    Args:
        projection: as of `nestling.embed.training.train.train`, or a kind of `fit_projections`.
        prompts: of the columns of the examples.
        path: a file that they are written to.
        written: read it, if it exists: a training that goes on, or another process of one, must not find others.
        teacher, numbers: embeddings by a teacher, and which of them the texts have, ``[rows, columns]``.
    """
    if not projection:
        return {}
    if written and path.is_file():
        return read_projections(path)
    if isinstance(projection, str):
        every = [(prompts.get(name, ""), text) for name, column in examples.columns.items() for text in column]
        places = {prompt + text: place for place, (prompt, text) in enumerate(every)}
        few = list(places)[:: -(-len(places) // SAMPLE)]
        asked = [every[places[text]][0] for text in few]
        target = None
        if teacher is not None and numbers is not None:
            target = teacher[numbers.T.flatten()[torch.tensor([places[text] for text in few])]]
        # Where texts are all there is, similarities themselves are followed.
        flatten = 0.0 if examples.kind == "texts" else 0.5
        depths = turned_depths(ladder)
        kind: Any = projection
        projection = fit_projections(model, few, depths, kind=kind, target=target, flatten=flatten, prompts=asked)
    write_projections(path, projection)
    return read_projections(path)
