"""The projections that belong to a model: those it was trained with, remembered so that nobody can forget them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from nestling.embed.model.folder import LADDER_FILE, load_projections
from nestling.embed.model.parts import unwrapped
from nestling.embed.model.projection import Projection

NAME = "nestling_projections"  # of a model's attribute
Projections = Mapping[int, Callable[[Tensor], Tensor]]


def remember(model: SentenceTransformer, projections: Mapping[int, Projection]) -> None:
    """Let a model know its projections, by depth; an empty mapping: it has none, whatever its folder says."""
    setattr(model, NAME, dict(projections))


def own_projections(model: nn.Module) -> dict[int, Projection]:
    """The projections of a model that `load_encoder` has loaded or a training has trained; empty if it has none.

    A model that stock code has loaded from such a folder has those of the folder, with a warning.

    Raises:
        LadderError: the folder's files are damaged.
    """
    inner: Any = unwrapped(model)
    if (known := getattr(inner, NAME, None)) is not None:
        return dict(known)
    folder = str(getattr(getattr(inner[0], "model", None), "name_or_path", "") or "")
    if not folder or not (Path(folder) / LADDER_FILE).is_file():
        return {}
    found = load_projections(folder)
    if found:
        warnings.warn(
            f"the model was loaded from {folder}, whose sizes were trained with projections: they are used; load it "
            "with ElasticEncoder.from_pretrained, or give projections={} to leave them out",
            stacklevel=3,
        )
    return found


def chosen(projections: Projections | None, model: nn.Module) -> Projections:
    """The projections that were given, if any were, else the model's own."""
    return own_projections(model) if projections is None else projections
