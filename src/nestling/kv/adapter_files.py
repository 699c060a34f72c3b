"""The files of an adapter, read with checks and written atomically.

Two files beside a card: ``nestling_adapter.json`` (format version, the model's fingerprint, how the bases were made,
and ``sha256``, the checksum of the other one) and ``nestling_adapter.safetensors`` with, for each layer l,
``layers.l.{key,value}.encode`` ``[Hkv, D, D]``, ``.mean`` and ``.drop_cost`` ``[Hkv, D]``, all fp32; in adapters that
caches can be quantised by also ``.quantisation_cost`` ``[Hkv, D, 1 + widths]`` and ``.step`` ``[Hkv, D]``. Where keys
turn with their position there is ``layers.l.key.drift`` ``[Hkv, spans, D]``. ``decode`` is not stored: it is the
inverse of ``encode``. A searched allocation adds ``layers.l.{key,value}.path.NAME`` ``[Hkv, blocks]``, which serves
every budget.

In format 2 quantisation costs lack those at no bits, which are the drop costs. In format 1 drop costs are
``.energy``, and in place of costs at each width there is ``.noise`` ``[Hkv, D]``, what a coordinate costs if it is off
by as much as it varies, and ``errors``, the mean squares that quantisers lose, as shares of all. The oldest have other
file names, which are PEFT's, and no checksum. The card is ``README.md``, or, where somebody else's file has that name,
``nestling_adapter.md``.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from nestling.errors import AdapterError, FileError, NestlingError
from nestling.files.folders import Parts, read_sealed, sha256, waiting, write_folder
from nestling.files.hub import download
from nestling.files.reading import LARGEST, read_object, read_tensors, read_text, tensor_shapes
from nestling.files.writing import check_folder, version_of
from nestling.kv.adapter_config import FORMAT, KIND, SIDES, basis_of, read_config
from nestling.kv.allocation.table import block_sizes
from nestling.kv.integration.structure import fingerprint, text_config
from nestling.kv.quantisation.quantiser import WIDTHS

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "nestling_adapter.json", "nestling_adapter.safetensors", "README.md"
OLD_CONFIG_FILE, OLD_WEIGHTS_FILE, OTHER_CARD_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "nestling_adapter.md",
)
HEAD = ("format", "kind", "nestling", "sha256", "card", "card_sha256", "errors")  # keys that say nothing of the bases
OLD_NAMES = {"energy": "drop_cost", "noise": "quantisation_cost"}  # of tensors, in format 1
SPANS = 2**16  # of positions, beyond those of any model
OLD_WIDTHS = (1, 2, 3, 4, 8)  # of quantisers, in format 1
BUILT_IN = Path(__file__).parent / "adapters"


def write(folder: str | Path, info: dict, tensors: dict[str, Tensor], card: str) -> None:
    """Write config, weights and card: an adapter in ``folder`` is replaced whole or not at all, other files stay.

    Raises:
        AdapterError, FileError: as `check_place`; or it cannot be written. What was there is as it was.
    """
    folder = Path(folder)
    check_place(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    config = {"format": FORMAT, "kind": KIND, "nestling": version_of("nestling"), **info}

    def fill(new: Path) -> None:
        save_file(tensors, new / WEIGHTS_FILE)
        text = card or _default_card(config)
        name = CARD_FILE if _may_have_card(folder, text) else OTHER_CARD_FILE
        (new / name).write_text(text, encoding="utf-8")
        sums = {"sha256": sha256(new / WEIGHTS_FILE), "card": name, "card_sha256": sha256(new / name)}
        (new / CONFIG_FILE).write_text(json.dumps(config | sums, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill, over=Parts(CONFIG_FILE, (WEIGHTS_FILE, CARD_FILE, OTHER_CARD_FILE)))
    _remove_old(folder)


def check_place(folder: str | Path, nbytes: int = 0) -> None:
    """Whether an adapter can be written to a folder, before the work for it is done.

    Raises:
        FileError: the folder cannot be made or written to, or there is no room for ``nbytes``.
        AdapterError: something else has the name of one of the adapter's files.
    """
    check_folder(folder, nbytes)
    for name in (CONFIG_FILE, WEIGHTS_FILE, OTHER_CARD_FILE):
        path = Path(folder) / name
        if path.exists() and not path.is_file():
            raise AdapterError(f"{path} is not a file of an adapter: choose another folder, or move it away")
    config = Path(folder) / CONFIG_FILE
    if (stored := _stored(config)) is not None and stored.get("kind") != KIND:
        raise AdapterError(f"{config} is not an adapter's: choose another folder, or move it away")


def expected_bytes(model) -> int:
    """About what an adapter of a model takes on the disk; 0 for one that cannot have one, which fitting says why."""
    with contextlib.suppress(NestlingError, AttributeError):
        shape = fingerprint(text_config(model))
        width = shape["head_dim"]
        return 2 * 4 * len(shape["layers"]) * shape["num_key_value_heads"] * (width * width + 2 * width)
    return 0


def _stored(path: Path) -> dict | None:
    """What a JSON file has, if it can be read and has an object."""
    try:
        return read_object(path)
    except FileError:
        return None


def _may_have_card(folder: Path, text: str) -> bool:
    """Whether ``README.md`` may be written: there is none, or it is the one that an adapter here was saved with."""
    path = folder / CARD_FILE
    if not path.exists():
        return True
    if not path.is_file():
        return False
    if path.stat().st_size > LARGEST:
        return False
    content = path.read_bytes()
    if content == text.encode():
        return True
    config = _stored(folder / CONFIG_FILE)
    if config is not None:
        return config.get("card") == CARD_FILE and config.get("card_sha256") == hashlib.sha256(content).hexdigest()
    old = _stored(folder / OLD_CONFIG_FILE)
    if old is None or old.get("kind") != KIND:
        return False
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, jinja2.TemplateError):  # damaged config
        return content == _default_card(old).encode()
    return False


def _remove_old(folder: Path) -> None:
    """Remove an adapter's files under their old names, once it has been replaced; never PEFT's of those names."""
    config, weights = folder / OLD_CONFIG_FILE, folder / OLD_WEIGHTS_FILE
    if (_stored(config) or {}).get("kind") != KIND:
        return
    with contextlib.suppress(OSError, SafetensorError):
        if weights.is_file():
            with safe_open(weights, "pt") as file:
                if not all(re.match(r"layers\.\d+\.(key|value)\.", name) for name in file.keys()):
                    return
            weights.unlink()
        config.unlink()


def read(folder: str | Path) -> tuple[dict, dict[str, Tensor], str]:
    """Config (``model`` and how it was made), tensors by name, and card of a folder, built-in name or hub id.

    Raises:
        AdapterError: for missing, truncated, foreign or inconsistent files, naming the file and what is wrong.
    """
    path = Path(folder)
    if not path.is_dir():
        path = BUILT_IN / path if str(folder) in built_in() else _downloaded(str(folder))
    config, tensors = _read_pair(path)
    name = config.get("card")
    card = path / (name if name in (CARD_FILE, OTHER_CARD_FILE) else CARD_FILE)
    info = {k: v for k, v in config.items() if k not in HEAD}
    return info, tensors, read_text(card, AdapterError) if card.is_file() else ""


def _read_pair(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors, which belong together; another process may be replacing them."""
    old = not (folder / CONFIG_FILE).exists() and (folder / OLD_CONFIG_FILE).exists()
    path, weights = (
        folder / name for name in ((OLD_CONFIG_FILE, OLD_WEIGHTS_FILE) if old else (CONFIG_FILE, WEIGHTS_FILE))
    )
    if not os.path.lexists(path):
        raise AdapterError(f"{path} is missing: not an adapter folder")
    for _ in range(3):
        config = read_config(path)
        tensors, whole = _read_tensors(weights, config)
        if whole:
            return config, tensors
    raise AdapterError(f"{weights} is not what was saved with {path.name} (sha256 differs): copy both files again")


def _read_tensors(weights: Path, config: dict) -> tuple[dict[str, Tensor], bool]:
    """Tensors by name, and whether they are those that the config was written with."""
    checksum = config.get("sha256")
    for path in (weights, *(() if checksum is None else (waiting(weights, checksum),))):
        if os.path.lexists(path):
            _check_tensors(path, config, _renamed(tensor_shapes(path, AdapterError), config))
    try:
        content = None if checksum is None else read_sealed(weights, checksum)
        tensors = read_tensors(weights, AdapterError) if content is None else load(content)
    except FileNotFoundError:
        raise AdapterError(f"{weights} is missing") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{weights} cannot be read ({error})") from error
    if wrong := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise AdapterError(f"{weights}: {wrong[0]} is of {tensors[wrong[0]].dtype}, expected floating point")
    tensors = _renamed(tensors, config)
    return _by_width(tensors, config), checksum is None or content is not None


def _renamed(by_name: dict[str, Any], config: dict) -> dict[str, Any]:
    """By the names of tensors of today's format, from those of the config's."""
    if config["format"] != 1:
        return by_name
    parts = {name: name.rsplit(".", 1) for name in by_name}
    return {f"{place}.{OLD_NAMES.get(last, last)}": by_name[name] for name, (place, last) in parts.items()}


def _by_width(tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """With costs at no bits and at each width.

    Format 1 has them as the noise of a coordinate and the mean errors of quantisers. Widths that it does not know are
    given the costs of the next smaller one, so that nothing is stored with them.
    """
    if config["format"] == FORMAT:
        return tensors
    if config["format"] == 2:
        return {name: _from_no_bits(tensors, name, t) for name, t in tensors.items()}
    errors = config.get("errors")
    if errors is None:
        return {name: t for name, t in tensors.items() if not name.endswith((".quantisation_cost", ".step"))}
    by_width = dict(tensors)
    for place in {name.removesuffix(".step") for name in tensors if name.endswith(".step")}:
        known = dict(zip(OLD_WIDTHS, errors[place.rsplit(".", 1)[1]], strict=True))
        shares = [known[max(old for old in OLD_WIDTHS if old <= bits)] for bits in WIDTHS]
        noise = tensors[f"{place}.quantisation_cost"]
        by_width[f"{place}.quantisation_cost"] = noise.float()[..., None] * torch.tensor(shares)
    return {name: _from_no_bits(by_width, name, t) for name, t in by_width.items()}


def _from_no_bits(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """Quantisation costs with those at no bits before them, the drop costs; other tensors as they are."""
    place, last = name.rsplit(".", 1)
    if last != "quantisation_cost":
        return tensor
    return torch.cat((tensors[f"{place}.drop_cost"].float()[..., None], tensor.float()), -1)


def built_in() -> list[str]:
    """Names of the trained adapters that come with the package, those of the built-in models."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CONFIG_FILE}"))


def path_names(tensors: Iterable[str]) -> list[str]:
    """Names of the searched allocations among the names of tensors."""
    parts = [name.split(".", 4) for name in tensors]
    return sorted({p[4] for p in parts if len(p) == 5 and p[3] == "path"})


def _check_tensors(weights: Path, config: dict, found: dict[str, list[int]]) -> None:
    """Whether tensors of these names and shapes are those of an adapter of such a config."""
    model = config["model"]
    heads, width = model["num_key_value_heads"], model["head_dim"]
    shapes = {"encode": [heads, width, width], "mean": [heads, width], "drop_cost": [heads, width]}
    if f"layers.{model['layers'][0]}.key.quantisation_cost" in found:
        several = {1: [], 2: [len(WIDTHS)]}.get(config["format"], [1 + len(WIDTHS)])
        shapes |= {"quantisation_cost": [heads, width, *several], "step": [heads, width]}
    shapes |= {f"path.{name}": [heads, len(block_sizes(width))] for name in path_names(found)}
    expected = {f"layers.{i}.{s}.{n}": shape for i in model["layers"] for s in SIDES for n, shape in shapes.items()}
    if (drift := found.get(f"layers.{model['layers'][0]}.key.drift")) is not None and len(drift) == 3:
        spans = min(max(drift[1], 1), SPANS)
        expected |= {f"layers.{i}.key.drift": [heads, spans, width] for i in model["layers"]}
    if missing := sorted(set(expected) - set(found)):
        raise AdapterError(f"{weights} lacks {len(missing)} tensors, first {missing[0]}: not an adapter of this model")
    if foreign := sorted(set(found) - set(expected)):
        raise AdapterError(f"{weights} holds {len(foreign)} unknown tensors, first {foreign[0]}: not an adapter")
    for name, shape in expected.items():
        if found[name] != shape:
            raise AdapterError(f"{weights}: {name} has shape {found[name]}, expected {shape}")


def _downloaded(repo_id: str) -> Path:
    folder = download(repo_id, (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, OTHER_CARD_FILE))
    if (folder / CONFIG_FILE).is_file():
        return folder
    return download(repo_id, (OLD_CONFIG_FILE, OLD_WEIGHTS_FILE, CARD_FILE))


def _default_card(config: dict) -> str:
    """What an adapter is, how it was made, and, once trained, the KL at the start and at the end of that."""
    training = config.get("training") or {}
    points = [p for p in training.get("curve", []) if any(name.startswith("kl_") for name in p)]
    template = jinja2.Template(
        Path(__file__).with_name("card.md.jinja").read_text("utf-8"), keep_trailing_newline=True
    )
    return template.render(
        config, basis=basis_of(config), points=[points[0], points[-1]] if points else [], nan=math.nan,
        names=[name for name in points[0] if name.startswith("kl_")] if points else [],
        shares=shares_of(training.get("sampling", "")),
    )  # fmt: skip


def shares_of(sampling: str) -> str:
    """What the shares are of at which a training is measured, in words."""
    return "16 bits a coordinate" if sampling == "bits" else "the ranks"
