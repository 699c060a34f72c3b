"""What a training, an alignment or a pre-training wrote, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from nestling.embed.adapter import ElasticAdapter
from nestling.embed.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from nestling.embed.ladder import Ladder
from nestling.embed.model.copies import copied
from nestling.embed.model.encode import served_prompts
from nestling.embed.model.folder import (
    ADAPTER,
    CARD_FILE,
    PARTS,
    PROJECTIONS_FILE,
    check_place,
    may_have_card,
    write_ladder,
    write_projections,
)
from nestling.embed.model.lora import merged
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.training.trainer import without_bars
from nestling.errors import TrainingError
from nestling.files.folders import sha256, write_folder
from nestling.jobs import checkpoints


@dataclass(frozen=True)
class Trained:
    """What a training made; the model itself was trained in place.

    Attributes:
        folder: a sentence-transformers folder, with ``nestling.json``; None if nothing was written.
        ladder: the sizes that were trained.
        projections: by depth, applied to pooled vectors before they are cut; needed by exports and measurements.
        adapter: of small sizes, which is kept within the folder.
        info: settings, seconds (of all runs), and ``curve``, the losses and measurements by step; as in
            ``nestling.json``.
    """

    folder: Path | None
    ladder: Ladder
    projections: dict[int, Projection] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    adapter: ElasticAdapter | None = None


def weight_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters, about those of its folder."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_places(model: nn.Module, out: Path, name: str, resume: bool) -> None:
    """Whether the result of a training and its checkpoints can be written, before anything is computed.

    Args:
        name: under which ``nestling.json`` speaks of such a training.

    Raises:
        TrainingError: a folder is there, and is not that of this training, or not to be resumed.
        FileError: one cannot be made or written to, or there is no room for a checkpoint and the result.
    """
    check_place(out, name, resume, 2 * weight_bytes(model))
    checkpoints.check_place(out.with_name(f"{out.name}-checkpoints"), resume)


def save(model: SentenceTransformer, trained: Trained, name: str, card: str, resumed: bool = False) -> None:
    """Write the folder of what was trained, whole or not at all.

    Adapters (LoRA) are merged into its weights, and prompts are under the names by which stock code uses them.

    Args:
        name: of ``trained.info`` in ``nestling.json``.
        card: the model card.
        resumed: the folder may be there, as the training's result, whose files are replaced; but not its card, if
            somebody has changed that.

    Raises:
        TrainingError: the weights in the folder are other ones.
        FileError: it cannot be written.
    """
    folder = trained.folder
    if folder is None:
        raise TrainingError("there is no folder to save to")

    def fill(new: Path) -> None:
        served = copied(merged(Encoder.of(model).model))
        served.prompts = dict(served_prompts(served))
        with without_bars():
            served.save_pretrained(str(new), create_model_card=False)
        named: dict[str, Any] = {"projections": PROJECTIONS_FILE} if trained.projections else {}
        if trained.adapter is not None:
            trained.adapter.save_pretrained(new / ADAPTER)
            named[ADAPTER] = [CONFIG_FILE, WEIGHTS_FILE]
        if trained.projections:
            write_projections(new / PROJECTIONS_FILE, trained.projections)
        if may_have_card(folder):
            (new / CARD_FILE).write_text(card, "utf-8")
        write_ladder(new, trained.ladder.to_json() | named | ({name: trained.info} if name else {}))
        if resumed:
            _check_same(new, folder)

    write_folder(folder, fill, over=PARTS if resumed else None)


def _check_same(new: Path, folder: Path) -> None:
    """A training that has ended is resumed to the same weights. Others are somebody's, who goes on from there."""
    for path in new.rglob("*.safetensors"):
        old = folder / path.relative_to(new)
        if old.is_file() and sha256(old) != sha256(path):
            raise TrainingError(f"{old} is not what this training gives: move {folder} away, and resume again")
