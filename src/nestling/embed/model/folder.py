"""What a trained encoder's folder holds beside a stock sentence-transformers model: its ladder and projections.

``nestling.json`` has the sizes (`Ladder.to_json`), how they were trained, in the folder of an export which size it is,
and, under ``sha256``, checksums of the folder's safetensors files by name. ``projections.safetensors`` has
``DEPTH.encode`` ``[H, H]`` and perhaps ``DEPTH.mean`` ``[H]``, fp32, for each depth whose pooled vectors are projected
before they are cut. Stock readers ignore both files.
"""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.hub import find_file
from nestling.embed.model.projection import Projection
from nestling.errors import LadderError, LoadError, TrainingError, UnreachableError
from nestling.files.fields import Fields
from nestling.files.folders import Parts, read_sealed, sha256, waiting
from nestling.files.reading import read_object, read_tensors, short, tensor_shapes
from nestling.files.temporary import temporary_file
from nestling.files.writing import check_folder, naming, sync
from nestling.report.results import plain

LADDER_FILE, PROJECTIONS_FILE, CARD_FILE = "nestling.json", "projections.safetensors", "README.md"
ADAPTER = "adapter"  # folder of an elastic adapter within that of its encoder
MADE = ("training", "pretraining", "alignment")
FORMER_FILE = "rotations.safetensors"  # as earlier releases called it, under "rotations" in nestling.json
PARTS = Parts(LADDER_FILE, (PROJECTIONS_FILE, CARD_FILE))


def load_ladder(name: str | os.PathLike[str]) -> Ladder | None:
    """The sizes that an encoder was trained for; of an export, its own size alone. None if none are named.

    Args:
        name: a folder or a hub id, as for `load_encoder`.

    Raises:
        LadderError: ``nestling.json`` is damaged.
        LoadError: there is no such model.
    """
    found = read(name)
    if found is None:
        return None
    return Ladder([Size.parse(str(found["cup"]))]) if "cup" in found else Ladder.from_json(found)


def load_info(name: str | os.PathLike[str]) -> dict[str, Any]:
    """How an encoder's sizes were made, as ``{"training": {...}}`` or another of `MADE`; empty if it is not said.

    Raises:
        LadderError, LoadError: as `load_ladder`.
    """
    found = read(name) or {}
    return {key: found[key] for key in MADE if found.get(key) is not None}


def load_projections(name: str | os.PathLike[str]) -> dict[int, Projection]:
    """The projection of each depth that an encoder was trained with; empty if there were none.

    Args:
        name: a folder or a hub id, as for `load_encoder`.

    Raises:
        LadderError: a file is damaged, or the projections that ``nestling.json`` speaks of are missing.
        LoadError: there is no such model.
    """
    found = read(name)
    file = (found or {}).get("projections") or (found or {}).get("rotations")
    if found is None or not file:
        return {}
    path, checksum = find_file(name, file), checksums(found).get(file)
    if path is None and checksum is not None:
        path = waiting(Path(name, file), checksum)
    if path is None or not path.is_file():
        raise LadderError(f"{name}: {file} is missing, and {LADDER_FILE} says that the sizes need it")
    return read_projections(path, checksum)


def find_adapter(name: str | os.PathLike[str]) -> Path | None:
    """The folder of the adapter that lies beside an encoder, if ``nestling.json`` speaks of one.

    Raises:
        LadderError: it is missing.
        LoadError: there is no such model.
    """
    found = read(name)
    if found is None or not found.get(ADAPTER):
        return None
    files = [find_file(name, f"{ADAPTER}/{file}") for file in found[ADAPTER]]
    if None in files or not files:
        raise LadderError(f"{name}: the {ADAPTER} is missing, and {LADDER_FILE} says that the sizes need it")
    return Path(files[0]).parent  # type: ignore[arg-type]


def check_weights(folder: Path) -> None:
    """Compare a folder's weights with the checksums that they were saved with, if there are any.

    Raises:
        LoadError: a file has changed since.
    """
    found = read(folder)
    for name, checksum in checksums(found or {}).items():
        path = folder / name
        if name in (PROJECTIONS_FILE, FORMER_FILE) or not path.is_file():
            continue
        tensor_shapes(path, LoadError)  # before all of a file is read that has no end
        if sha256(path) != checksum:
            raise LoadError(
                f"{path} is not what was saved with {LADDER_FILE} (sha256 differs): it is damaged, copy it again; if "
                f"another program was meant to change it, remove 'sha256' from {LADDER_FILE}"
            )


def checksums(found: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of files by name, of what ``nestling.json`` has; folders of older releases have none."""
    return dict(found.get("sha256") or {})


def check_place(folder: Path, name: str, resume: bool, nbytes: int = 0) -> None:
    """Whether the result of a training can be written, before it starts.

    Args:
        name: under which ``nestling.json`` speaks of such a training.
        resume: whether the folder may be there already, as that training's result.
        nbytes: that will be needed.

    Raises:
        TrainingError: the folder exists, or is not a training's.
        FileError: it cannot be made or written to, or there is no room.
    """
    if folder.exists() and not resume:
        raise TrainingError(f"{folder} exists: choose another folder, or remove it")
    check_folder(folder, nbytes)
    if folder.exists() and any(folder.iterdir()) and name not in (read(folder) or {}):
        raise TrainingError(f"{folder} is not the result of a {name} to resume: choose another folder, or remove it")


def read(name: str | os.PathLike[str]) -> dict[str, Any] | None:
    """All of ``nestling.json``; None if there is no such file, or none can be asked for, with a warning."""
    try:
        path = find_file(name, LADDER_FILE)
    except UnreachableError as error:  # most models have none, and this one itself may be in the cache
        warnings.warn(f"{error}: taken for a model without sizes of its own", stacklevel=3)
        return None
    if path is None:
        return None
    found = read_object(path, LadderError)
    try:
        _check(Fields(path, found, LadderError))
        Ladder.from_json(found)
    except LadderError as error:
        raise LadderError(f"{path} is damaged ({error}): copy it again from where the model came from") from error
    return found


def _check(found: Fields) -> None:
    """Whether the values of ``nestling.json`` beside the sizes are of their types."""
    if (size := found.text("cup", default=None)) is not None:
        Size.parse(size)
    found.text("space", default=None)
    found.text("projections", (PROJECTIONS_FILE,), default=None)
    found.text("rotations", (FORMER_FILE,), default=None)
    for name in ("projected", "rotated"):
        found.flag(name, default=None)
    for name in MADE:
        found.object(name, default=None)
    for file in found.array(ADAPTER, default=[]):
        if not isinstance(file, str) or not re.fullmatch(r"[\w-]+\.\w+", file, re.ASCII):
            raise LadderError(f"{found.where}: '{ADAPTER}' must be names of files, got {short(file)}")
    if (sums := found.object("sha256", default=None)) is not None:
        for name in sums.values:
            outside = Path(name).is_absolute() or ".." in Path(name).parts
            if outside or not re.fullmatch("[0-9a-f]{64}", sums.text(name)):
                raise LadderError(f"{sums.where} must be checksums of files in the folder, got {short(name)}")


def read_projections(path: Path, checksum: str | None = None) -> dict[int, Projection]:
    """The projections of a file, by depth.

    Args:
        checksum: the file's, where it is known.

    Raises:
        LadderError: it cannot be read, is damaged, or is not the one with that checksum.
    """
    try:
        shapes = tensor_shapes(path, LadderError)
        content = None if checksum is None else read_sealed(path, checksum)
        tensors = read_tensors(path, LadderError) if content is None else load(content)
        turns = _turns(tensors, shapes)
    except (SafetensorError, ValueError, OSError) as error:
        raise LadderError(f"{path} is damaged ({error}): copy it again from where the model came from") from error
    if checksum is not None and content is None:
        raise LadderError(f"{path} is not what was saved with {LADDER_FILE} (sha256 differs): copy it again")
    return turns


def _turns(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[int, Projection]:
    """Raises ValueError for tensors that are no projections."""
    for name, tensor in tensors.items():
        if not re.fullmatch(r"[1-9]\d{0,8}\.(encode|mean)", name, re.ASCII):
            raise ValueError(f"unknown tensor {short(name)}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite numbers in floating point, {tensor.dtype}")
    depths = sorted({int(name.split(".")[0]) for name in tensors})
    if missing := [depth for depth in depths if f"{depth}.encode" not in tensors]:
        raise ValueError(f"{missing[0]}.encode is missing")
    if len({shapes[f"{depth}.encode"][0] for depth in depths if shapes[f"{depth}.encode"]}) > 1:
        raise ValueError("projections of several widths")
    return {depth: Projection(tensors[f"{depth}.encode"], tensors.get(f"{depth}.mean")) for depth in depths}


def write_projections(path: Path, projections: Mapping[int, Projection]) -> None:
    """The file that `read_projections` reads, written whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    tensors = {
        f"{depth}.{name}": tensor.cpu().contiguous()
        for depth, projection in projections.items()
        for name, tensor in projection.state_dict().items()
    }
    with naming(path), temporary_file(path.parent) as new:
        mode = stat.S_IMODE(new.stat().st_mode)
        save_file(tensors, new)
        new.chmod(mode)  # safetensors makes a file that only its owner reads
        sync(new)
        new.replace(path)


def may_have_card(folder: Path) -> bool:
    """Whether ``README.md`` may be written: there is none, or it is the one that was saved with ``nestling.json``."""
    path = folder / CARD_FILE
    if not path.exists():
        return True
    return path.is_file() and (read(folder) or {}).get("card_sha256") == sha256(path)


def write_ladder(folder: Path, value: Mapping[str, Any]) -> None:
    """Write ``nestling.json`` into a folder whose other files are complete, with their checksums."""
    card = {"card_sha256": sha256(folder / CARD_FILE)} if (folder / CARD_FILE).is_file() else {}
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
    text = json.dumps(plain({**value, **card, "sha256": sums}), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / LADDER_FILE).write_text(text + "\n", "utf-8")
