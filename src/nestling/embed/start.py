"""The rotations that a training starts from, kept beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sentence_transformers import SentenceTransformer

from nestling.embed.examples import Examples
from nestling.embed.files import read_rotations, write_rotations
from nestling.embed.rotation import Rotation, rotations
from nestling.ladder import Ladder

SAMPLE = 10_000  # texts that principal components are taken of


def turned_depths(ladder: Ladder) -> list[int]:
    """The depths that have a rotation. The full model's has none, unless narrower cups share it: it stays as it is."""
    full = ladder.full
    return sorted({cup.layers for cup in ladder if cup.layers < full.layers or cup.dims < full.dims})


def start_rotations(
    model: SentenceTransformer,
    rotation: str | Mapping[int, Rotation] | None,
    ladder: Ladder,
    examples: Examples,
    prompts: Mapping[str, str],
    path: Path,
    written: bool,
) -> dict[int, Rotation]:
    """Copies of the rotations that were asked for.

    Args:
        rotation: as of `nestling.embed.train.train`, ``"pca"`` or ``"centred"``.
        prompts: of the columns of the examples.
        path: a file that they are written to.
        written: read it, if it exists: a training that goes on, or another process of one, must not find others.
    """
    if not rotation:
        return {}
    if written and path.is_file():
        return read_rotations(path)
    if isinstance(rotation, str):
        prompted = [prompts.get(name, "") + text for name, column in examples.columns.items() for text in column]
        texts = list(dict.fromkeys(prompted))
        few = texts[:: -(-len(texts) // SAMPLE)]
        rotation = rotations(model, few, turned_depths(ladder), centred=rotation == "centred")
    write_rotations(path, rotation)
    return read_rotations(path)
