"""What a trained encoder's folder holds beside a stock sentence-transformers model: its ladder and rotations.

``nestling.json`` has the cups (`Ladder.to_json`), how they were trained, and, in the folder of an export, which cup it
is. ``rotations.safetensors`` has ``DEPTH.encode`` ``[H, H]`` and perhaps ``DEPTH.mean`` ``[H]``, fp32, where training
started from a rotation: pooled vectors are turned by it before they are cut. Stock readers ignore both files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nestling.embed.rotation import Rotation
from nestling.ladder import Cup, Ladder, LadderError

LADDER_FILE, ROTATIONS_FILE = "nestling.json", "rotations.safetensors"


def load_ladder(folder: str | os.PathLike[str]) -> Ladder | None:
    """The cups that the encoder in a folder was trained for; of an export, its own cup alone. None if none are named.

    Raises:
        LadderError: ``nestling.json`` is damaged.
    """
    found = read(folder)
    if found is None:
        return None
    return Ladder([Cup.parse(str(found["cup"]))]) if "cup" in found else Ladder.from_json(found)


def load_rotations(folder: str | os.PathLike[str]) -> dict[int, Rotation]:
    """The rotation of each depth that the encoder in a folder was trained with; empty if there were none.

    Raises:
        LadderError: a file is damaged, or the rotations that ``nestling.json`` speaks of are missing.
    """
    found, path = read(folder), Path(folder) / ROTATIONS_FILE
    if found is None or not found.get("rotations"):
        return {}
    try:
        return read_rotations(path)
    except FileNotFoundError:
        raise LadderError(f"{path} is missing: {LADDER_FILE} says that the cups need it") from None


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """All of ``nestling.json``; None if there is no such file."""
    path = Path(folder) / LADDER_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        Ladder.from_json(found)
    except ValueError as error:
        raise LadderError(f"{path} is damaged ({error}): copy it again from where the model came from") from error
    return found


def read_rotations(path: Path) -> dict[int, Rotation]:
    """The rotations of a file, by depth."""
    try:
        tensors = load_file(path)
        depths = sorted({int(name.split(".")[0]) for name in tensors})
        return {depth: Rotation(tensors[f"{depth}.encode"], tensors.get(f"{depth}.mean")) for depth in depths}
    except (SafetensorError, ValueError, KeyError) as error:
        raise LadderError(f"{path} is damaged ({error}): copy it again from where the model came from") from error


def write_rotations(path: Path, rotations: Mapping[int, Rotation]) -> None:
    """The file that `read_rotations` reads, written whole or not at all."""
    tensors = {f"{depth}.encode": turn.encode.cpu().contiguous() for depth, turn in rotations.items()}
    tensors |= {f"{depth}.mean": turn.mean.cpu() for depth, turn in rotations.items() if turn.mean is not None}
    new = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(tensors, new)
    os.replace(new, path)
