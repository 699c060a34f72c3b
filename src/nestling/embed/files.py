"""What a trained encoder's folder holds beside a stock sentence-transformers model: its ladder and rotations.

``nestling.json`` has the cups (`Ladder.to_json`), how they were trained, and, in the folder of an export, which cup it
is. ``rotations.safetensors`` has ``DEPTH.encode`` ``[H, H]`` and perhaps ``DEPTH.mean`` ``[H]``, fp32, where training
started from a rotation, and perhaps trained it; it is applied to pooled vectors before they are cut. Stock readers
ignore both files.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nestling.embed.hub import find_file
from nestling.embed.rotation import Rotation
from nestling.errors import LadderError, UnreachableError
from nestling.ladder import Cup, Ladder

LADDER_FILE, ROTATIONS_FILE = "nestling.json", "rotations.safetensors"


def load_ladder(name: str | os.PathLike[str]) -> Ladder | None:
    """The cups that an encoder was trained for; of an export, its own cup alone. None if none are named.

    Args:
        name: a folder or a hub id, as for `load_encoder`.

    Raises:
        LadderError: ``nestling.json`` is damaged.
        LoadError: there is no such model.
    """
    found = read(name)
    if found is None:
        return None
    return Ladder([Cup.parse(str(found["cup"]))]) if "cup" in found else Ladder.from_json(found)


def load_rotations(name: str | os.PathLike[str]) -> dict[int, Rotation]:
    """The rotation of each depth that an encoder was trained with; empty if there were none.

    Args:
        name: a folder or a hub id, as for `load_encoder`.

    Raises:
        LadderError: a file is damaged, or the rotations that ``nestling.json`` speaks of are missing.
        LoadError: there is no such model.
    """
    found = read(name)
    if found is None or not found.get("rotations"):
        return {}
    path = find_file(name, ROTATIONS_FILE)
    if path is None:
        raise LadderError(f"{name}: {ROTATIONS_FILE} is missing, and {LADDER_FILE} says that the cups need it")
    return read_rotations(path)


def read(name: str | os.PathLike[str]) -> dict[str, Any] | None:
    """All of ``nestling.json``; None if there is no such file, or none can be asked for, with a warning."""
    try:
        path = find_file(name, LADDER_FILE)
    except UnreachableError as error:  # most models have none, and this one itself may be in the cache
        warnings.warn(f"{error}: taken for a model without cups of its own", stacklevel=3)
        return None
    if path is None:
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
    tensors = {
        f"{depth}.{name}": tensor.cpu().contiguous()
        for depth, rotation in rotations.items()
        for name, tensor in rotation.state_dict().items()
    }
    new = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(tensors, new)
    os.replace(new, path)
