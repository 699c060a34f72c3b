"""The files of a model, looked at before libraries read them.

Those open whatever has a name they know, be it a pipe, build as many layers as a config asks for before they look at
weights, and tell of a folder, not of the file that is damaged.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nestling.errors import FileError, NestlingError
from nestling.files.fields import Fields
from nestling.files.reading import LARGEST, check_regular, read_json, short, tensor_shapes

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "*.index.json",
    "processor_config.json", "adapter_config.json", "sentence_*_config.json", "config_sentence_transformers.json",
    "router_config.json", "modules.json", "special_tokens_map.json",
)  # fmt: skip
TEXTS = ("tokenizer.json", "vocab.*", "added_tokens.json", "merges.txt", "*.model", "*.jinja", "README.md")
WEIGHTS = ("*.safetensors",)
LARGEST_TEXT = 16 * LARGEST  # bytes
SIZES = frozenset("size dim layer layers head heads embd embeddings positions experts labels inner".split())
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST = 2**26  # of whatever a config counts: beyond any model's
MOST_NAMED = 2**20  # layers, or labels, for each of which something is made


def check_model_folder(folder: Path) -> None:
    """Whether libraries can be let loose on a folder: what they open are files, with well-formed JSON and weights.

    Raises:
        FileError: one is not; it is named.
    """
    for place in _places(folder):
        tensors = 0
        for path in _opened(place):
            if _is_one_of(path, WEIGHTS):
                tensors += len(tensor_shapes(path)) * path.name.startswith("model")
            elif is_config(path):
                value = read_json(path, finite=False, unique=False)
                if path.name == "config.json":
                    check_sizes(path, Fields(path, value, FileError).values)
                elif path.name.endswith(".index.json"):
                    _check_index(path, value)
            else:
                check_regular(path, largest=LARGEST_TEXT)
        config = place / "config.json"
        if tensors and os.path.lexists(config):
            check_sizes(config, read_json(config, finite=False, unique=False), layers=tensors)


def check_sizes(where: Any, config: Mapping[str, Any], layers: int = MOST_NAMED) -> None:
    """Whether the sizes in a model's config can be a model's.

    Args:
        where: what a message names.
        layers: at most; each has a tensor.

    Raises:
        FileError: one cannot; it is named.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(where, value, layers)
        if not isinstance(value, int | float) or SIZES.isdisjoint(words := str(key).lower().split("_")):
            continue
        most = layers if key in LAYERS else MOST_NAMED if "labels" in words else MOST
        if value > most:
            raise FileError(f"{where}: {short(key)} is {short(value)}, expected at most {most:,}")


def _places(folder: Path) -> list[Path]:
    """The folder itself, and those of its modules."""
    path = folder / "modules.json"
    if not os.path.lexists(path):
        return [folder]
    modules = Fields(path, {"modules": read_json(path, finite=False, unique=False)}, FileError).objects("modules")
    names = [module.text("path") for module in modules]
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise FileError(f"{path}: {short(outside[0])} is not a folder below it")
    return [folder, *sorted({folder / name for name in names if (folder / name).is_dir()} - {folder})]


def _opened(folder: Path) -> Iterator[Path]:
    """What libraries would open in a folder; and what nobody should wait for."""
    for path in sorted(folder.iterdir()):
        if _is_one_of(path, (*CONFIGS, *TEXTS, *WEIGHTS)) or _is_endless(path):
            yield path


def is_config(path: Path) -> bool:
    """Whether a file is a small one in JSON that says what a model, or its tokenizer, is like."""
    return _is_one_of(path, CONFIGS)


def check_no_pipes(folder: Path, error: type[NestlingError]) -> None:
    """Refuse a folder with something, at any depth, that a library would wait for without end.

    Raises:
        error: there is such a pipe, socket or device; it is named.
    """
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            if _is_endless(path):
                check_regular(path, error)


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _is_endless(path: Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _check_index(path: Path, value: Any) -> None:
    shards = Fields(path, value, FileError).object("weight_map")
    for name in shards.values:
        shard = shards.text(name)
        if os.path.basename(shard) != shard:
            raise FileError(f"{shards.where}: expected names of files beside it, got {short(shard)}")
        check_regular(path.with_name(shard), FileError)
