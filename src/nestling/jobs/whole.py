"""Whether a checkpoint is whole: every file that resuming reads is there, and is of the form that it must have.

Each kind of file is judged by what it tells of itself: archives by their own checksums, weights by their headers, JSON
by its types. The checksums of all files (`nestling.files.checksums`) tell the rest; a checkpoint that was written just
before a kill, or by an older version, has none.
"""

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from nestling.errors import TrainingError
from nestling.files.checksums import MANIFEST
from nestling.files.fields import Fields, is_number
from nestling.files.models import is_config
from nestling.files.reading import check_regular, read_json, read_object, reason, short, tensor_shapes

STATE_FILE = "trainer_state.json"
ARCHIVES = {
    "optimizer.pt": ("state", "param_groups"),
    "scheduler.pt": ("last_epoch",),
    "scaler.pt": (),
    "rng_state": ("python", "numpy", "cpu"),
}
WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
UNREAD = ("README.md", "training_args.bin", MANIFEST)
PLOTTED = re.compile(r"loss|eval_.*_loss|(kl_|mlm_|dec_)?\d+x\d+")  # what training curves are made of
NUMBERS = (
    "epoch", "max_steps", "logging_steps", "eval_steps", "save_steps", "train_batch_size", "num_train_epochs",
    "num_input_tokens_seen", "total_flos", "best_global_step",
)  # fmt: skip


def that_is_read(folder: Path) -> list[str]:
    """The names of a checkpoint's files that resuming reads, relative to it."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in files if name not in UNREAD and not name.startswith(".")]


def check_checkpoint(folder: Path) -> None:
    """Raises:
    TrainingError: a file that resuming reads is missing or damaged; it is named.
    """
    names = that_is_read(folder)
    sharded = any(name.startswith(("optimizer.bin", "optimizer_")) for name in names)  # as FSDP writes it
    for name in (STATE_FILE, "optimizer.pt", "scheduler.pt"):
        if name not in names and not (sharded and name == "optimizer.pt"):
            raise TrainingError(f"{folder / name}: no such file")
    if not any(name.startswith("rng_state") for name in names):
        raise TrainingError(f"{folder / 'rng_state.pth'}: no such file")
    check_weights(folder)
    for name in names:
        check_regular(folder / name, TrainingError)
    for name in names:
        _check_file(folder / name)
    check_state(folder)


def check_state(folder: Path) -> None:
    """Whether trainer_state.json has the values that the trainer, and we, read from it.

    Raises:
        TrainingError: it does not; file and value are named.
    """
    path = folder / STATE_FILE
    state = read_object(path, TrainingError, finite=False)  # a loss that was logged may be NaN
    typed = Fields(path, state, TrainingError)
    if unknown := sorted(set(state) - {field.name for field in fields(TrainerState)}):
        raise TrainingError(f"{path}: unknown key {short(unknown[0])}")
    if folder.name != f"checkpoint-{typed.whole('global_step')}":
        raise TrainingError(f"{path}: 'global_step' is {short(state['global_step'])} in {folder.name}")
    for name in NUMBERS:
        typed.number(name, 0, default=None)
    for entry in typed.objects("log_history", default=()):
        entry.whole("step")
        for name, value in entry.values.items():
            if PLOTTED.fullmatch(name) and not (isinstance(value, float) or is_number(value)):  # also NaN
                raise TrainingError(f"{entry.where}: {short(name)} must be a number, got {short(value)}")
    callbacks = typed.object("stateful_callbacks", default=None)
    for name, said in () if callbacks is None else callbacks.values.items():
        for callback in said if isinstance(said, list) else [said]:
            found = Fields(f"{path}: {short(name)}", callback, TrainingError)
            found.object("args", default=None)
            found.object("attributes", default=None)
    seconds_of(stateful(state, "Clock"), folder)
    if (best := best_of(folder)) is not None:
        check_weights(best)


def best_of(folder: Path) -> Path | None:
    """The checkpoint beside this one that had the best measurement up to it, and that a training ends with.

    Raises:
        TrainingError: trainer_state.json is damaged.
    """
    path = folder / STATE_FILE
    state = Fields(path, read_object(path, TrainingError, finite=False), TrainingError)
    best = state.text("best_model_checkpoint", default=None)
    return None if best is None else folder.with_name(Path(best).name or folder.name)


def stateful(state: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What a callback of that class name said of itself in the trainer's state; None if nothing.

    Raises:
        TrainingError: the state is not of that form.
    """
    found = Fields(STATE_FILE, state, TrainingError).object("stateful_callbacks", default=None)
    callback = None if found is None else found.object(name, default=None)
    said = None if callback is None else callback.object("attributes", default=None)
    return None if said is None else dict(said.values)


def seconds_of(clock: dict[str, Any] | None, folder: Path) -> float:
    """The time that a training took up to a checkpoint; 0 if it does not say.

    Raises:
        TrainingError: what it says is no time.
    """
    return 0.0 if clock is None else Fields(folder / STATE_FILE, clock, TrainingError).number("seconds", 0)


def check_weights(folder: Path) -> None:
    """Raises TrainingError unless the folder has weights: whole, in shards, or of PEFT, perhaps by adapter."""
    place = folder / _transformer(folder)
    if os.path.lexists(place / INDEX):
        _check_shards(place)
        return
    found = [place / WHOLE, *folder.glob(f"**/{ADAPTER}")]
    found = [path for path in found if os.path.lexists(path)]
    if not found and not any(path.is_dir() for path in folder.glob("pytorch_model_fsdp*")):
        raise TrainingError(f"{place / WHOLE}: no such file")
    for path in found:
        tensor_shapes(path, TrainingError)


def _transformer(folder: Path) -> str:
    """The folder, within it, of the weights of an encoder that was trained: its first module's."""
    path = folder / "modules.json"
    if not os.path.lexists(path):
        return ""
    modules = Fields(path, {"modules": read_json(path, TrainingError)}, TrainingError).objects("modules")
    return next((module.text("path") for module in modules), "")


def _check_shards(folder: Path) -> None:
    index = Fields(folder / INDEX, read_object(folder / INDEX, TrainingError), TrainingError)
    shards = index.object("weight_map").values
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or os.path.basename(shard) != shard:
            raise TrainingError(f"{index.where}: {short(tensor)} must be in a file, got {short(shard)}")
    there = {shard: tensor_shapes(folder / shard, TrainingError) for shard in sorted(set(shards.values()))}
    if missing := [tensor for tensor, shard in shards.items() if tensor not in there[shard]]:
        raise TrainingError(f"{folder / shards[missing[0]]} lacks {short(missing[0])}, which {INDEX} names")


def _check_file(path: Path) -> None:
    keys = next((keys for name, keys in ARCHIVES.items() if path.name.startswith(name)), None)
    if keys is not None and path.suffix in (".pt", ".pth"):
        _check_archive(path, keys)
    elif path.suffix == ".safetensors":
        tensor_shapes(path, TrainingError)
    elif is_config(path):
        read_json(path, TrainingError, finite=False, unique=False)


def _check_archive(path: Path, keys: tuple[str, ...]) -> None:
    """A file of torch.save: a zip whose parts have checksums, with a dictionary that has the keys."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())  # never by torch
            bad = packed or archive.testzip()
        found = None if bad else _unpickled(path)
    except Exception as error:  # damaged files fail in any way
        raise TrainingError(f"{path} is damaged ({reason(error)})") from error
    if bad:
        raise TrainingError(f"{path} is damaged: a part of it is not what was written")
    if not isinstance(found, dict) or not all(key in found for key in keys):
        raise TrainingError(f"{path} is damaged: expected a dictionary with {', '.join(keys)}")


def _unpickled(path: Path) -> Any:
    with torch.serialization.safe_globals(_numpy_types()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _numpy_types() -> list[Any]:
    """What the states of random generators are made of."""
    rebuild: Any = np.empty(0).__reduce__()[0]  # of a module that numpy moves now and then
    return [rebuild, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
