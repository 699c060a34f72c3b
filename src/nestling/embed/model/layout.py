"""How the folder of an encoder is laid out: where its transformer is, and what cannot be read is told by its files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.embed.model.hub import find_file
from nestling.errors import LoadError, UnreachableError
from nestling.files.reading import reason
from nestling.models import ALIASES

LAYERLESS = (
    "StaticEmbedding",
    "Router",
    "Asym",
    "CLIPModel",
    "BoW",
    "WordEmbeddings",
)  # first modules of stock models
WEIGHTLESS = ("Pooling", "Normalize", "Dropout")
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Layout:
    """What is where in a model.

    Attributes:
        plain: it has no modules, as a folder of transformers' own.
        transformer: the folder of its first module, "" for the model's own.
        base: what an adapter (LoRA) is for, if the transformer is one.
    """

    plain: bool
    transformer: str
    base: str | None


def layout_of(name: str, source: Path | str) -> Layout:
    """Look at a model's files before anything of it is built.

    Raises:
        LoadError: modules.json is damaged, the first module has no layers, a module's weights could only be unpickled,
            or the transformer has no config.
    """
    path = find_file(source, "modules.json")
    modules = [] if path is None else _modules(name, path)
    if modules and modules[0][0] in LAYERLESS:
        raise LoadError(f"{name}: the model starts with a {modules[0][0]}: it has no layers to cut")
    for kind, folder in modules[1:]:
        if kind in WEIGHTLESS:
            continue
        pickled = kind == "Dense" or _find(source, _in(folder, "pytorch_model.bin")) is not None
        if pickled and find_file(source, _in(folder, WEIGHTS)) is None:
            raise LoadError(
                f"{name}: {folder} has no {WEIGHTS}, and other weights are not read: load the model in "
                "sentence-transformers, if you trust it, and save it again"
            )
    transformer = modules[0][1] if modules else ""
    adapter = _find(source, _in(transformer, ADAPTER))
    if adapter is not None:
        if find_file(source, _in(transformer, "adapter_model.safetensors")) is None:
            raise LoadError(f"{name}: it has {ADAPTER} but no adapter_model.safetensors: save it as safetensors")
        return Layout(not modules, transformer, _base(name, adapter))
    if isinstance(source, Path) and not (source / transformer / "config.json").is_file():
        where = f"its folder {transformer}" if transformer else "the folder"
        raise LoadError(f"{name}: {where} has no config.json; expected one written by save_pretrained")
    return Layout(not modules, transformer, None)


@contextmanager
def adapter_folder(source: Path | str, layout: Layout, locate: Callable[[str], Path | str]) -> Iterator[Path | str]:
    """The source itself; of an adapter for a built-in alias, links to its files beside a config that names a folder.

    The alias is the name that a model from `load_encoder` carries, and PEFT writes it down.
    """
    if not isinstance(source, Path) or layout.base not in ALIASES:
        yield source
        return
    with tempfile.TemporaryDirectory() as temp:
        shutil.copytree(source.absolute(), temp, dirs_exist_ok=True, copy_function=os.symlink)
        path = Path(temp, layout.transformer, ADAPTER)
        config = json.loads(path.read_text("utf-8"))
        path.unlink()
        config["base_model_name_or_path"] = str(locate(layout.base))
        path.write_text(json.dumps(config), "utf-8")
        yield Path(temp)


def _modules(name: str, path: Path) -> list[tuple[str, str]]:
    """The kind and the folder of each module."""
    try:
        modules: list[Any] = json.loads(path.read_text("utf-8"))
        return [(module["type"].rsplit(".", 1)[-1], _normal(module["path"])) for module in modules]
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{name}: modules.json is damaged [{reason(error)}]") from error


def _base(name: str, path: Path) -> str:
    try:
        base = json.loads(path.read_text("utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path is {base!r}")
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise LoadError(f"{name}: {ADAPTER} does not say what it adapts [{reason(error)}]") from error
    return base


def _find(source: Path | str, name: str) -> Path | None:
    """A file that most models do not have; what is not in the cache, stock code does not find either."""
    try:
        return find_file(source, name)
    except UnreachableError:
        return None


def _normal(folder: str) -> str:
    """``"./1_Pooling/"`` as ``"1_Pooling"``, the model's own folder as ``""``."""
    return "/".join(part for part in folder.split("/") if part not in ("", "."))


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
