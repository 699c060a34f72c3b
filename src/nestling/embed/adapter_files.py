"""The folder of an elastic adapter: ``elastic_adapter.json``, ``elastic_adapter.safetensors`` and a card.

The tensors are ``layers.NAME.down`` ``[rank, in]`` and ``layers.NAME.up`` ``[out, rank]`` of each linear layer, and
``projections.DEPTH.encode`` ``[H, H]`` and ``projections.DEPTH.mean`` ``[H]``: fp16, but for the full depth's basis,
which is fp32. The JSON has the fingerprint of the model, the sizes, the space, how the adapter was made, and the
checksum of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nestling.embed.ladder import Ladder
from nestling.errors import AdapterError, FileError, LadderError
from nestling.files.fields import Fields
from nestling.files.folders import Parts, read_sealed, sha256, write_folder
from nestling.files.hub import download
from nestling.files.reading import read_object, read_text, short, tensor_shapes
from nestling.files.writing import check_folder, version_of

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "elastic_adapter.json", "elastic_adapter.safetensors", "README.md"
PARTS = Parts(CONFIG_FILE, (WEIGHTS_FILE, CARD_FILE))
KIND, FORMAT = "nestling elastic adapter", 1
BUILT_IN = Path(__file__).parent / "adapters"
NAMES = re.compile(
    r"layers\.(?P<layer>[\w.]{1,200})\.(?:down|up)|projections\.(?P<depth>[1-9]\d{0,8})\.(?:encode|mean)"
)


def built_in() -> list[str]:
    """Names of the trained adapters that come with the package, those of the models that have an alias."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CONFIG_FILE}"))


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write the three files. An adapter in ``folder`` is replaced whole or not at all; other files there stay.

    Raises:
        FileError: they cannot be written, or something else has their names.
    """
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise FileError(f"{folder} holds other files and no adapter: choose another folder")

    def fill(new: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / WEIGHTS_FILE)
        (new / CARD_FILE).write_text(card, "utf-8")
        head = {"format": FORMAT, "kind": KIND, "nestling": version_of("nestling")}
        sums = {"sha256": sha256(new / WEIGHTS_FILE), "card_sha256": sha256(new / CARD_FILE)}
        value = {**head, **config, **sums}
        (new / CONFIG_FILE).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", "utf-8")

    write_folder(folder, fill, over=PARTS)


def read(name: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Config, tensors by name, and card of a folder, the name of one in the package, or a hub id.

    Raises:
        AdapterError: files are missing, damaged, or do not belong together; the message names the file.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = (
            BUILT_IN / str(name)
            if str(name) in built_in()
            else download(str(name), (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE))
        )
    path, weights, card = (folder / file for file in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE))
    if not path.is_file():
        raise AdapterError(f"{path} is missing: not a folder of an elastic adapter")
    config = read_object(path, AdapterError)
    checksum = _check(Fields(path, config, AdapterError))
    try:
        shapes = tensor_shapes(weights, AdapterError)
        content = read_sealed(weights, checksum)
        if content is None:
            raise AdapterError(f"{weights} is not what was saved with {CONFIG_FILE} (sha256 differs): copy both again")
        tensors = load(content)
    except FileNotFoundError:
        raise AdapterError(f"{weights} is missing") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{weights} cannot be read ({error}): copy it again") from error
    _check_tensors(weights, config, shapes, tensors)
    return config, tensors, read_text(card, AdapterError) if card.is_file() else ""


def _check(found: Fields) -> str:
    """The checksum of the tensors, if the config is an adapter's."""
    found.text("kind", (KIND,))
    if found.whole("format") != FORMAT:
        raise AdapterError(f"{found.where} has format {found.values['format']}, this version reads {FORMAT}: update")
    model = found.object("model")
    for name in ("layers", "dims"):
        model.whole(name, 1)
    model.text("weights")
    found.text("base_model", default=None)
    found.text("space")
    found.object("training")
    try:
        sizes = Ladder.parse(found.text("sizes"))
        sizes.check(model.values["layers"], model.values["dims"])
    except LadderError as error:
        raise AdapterError(f"{found.where}: {error}") from error
    return found.text("sha256")


def _check_tensors(
    weights: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]
) -> None:
    """Whether tensors are an adapter's of the model that the config tells of."""
    dims, depth = config["model"]["dims"], config["model"]["layers"]
    layers, depths = set(), set()
    for name, tensor in tensors.items():
        match = NAMES.fullmatch(name)
        if match is None:
            raise AdapterError(f"{weights} has an unknown tensor {short(name)}: not an elastic adapter")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterError(f"{weights}: {name} must be finite numbers in floating point")
        layers |= {match["layer"]} - {None}
        depths |= {int(match["depth"] or 0)} - {0}
        wanted = {"encode": [dims, dims], "mean": [dims]}.get(name.rpartition(".")[2])
        if wanted is not None and shapes[name] != wanted:
            raise AdapterError(f"{weights}: {name} has shape {shapes[name]}, expected {wanted}")
    for layer in sorted(layers):
        down, up = (shapes.get(f"layers.{layer}.{side}") for side in ("down", "up"))
        if down is None or up is None or len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise AdapterError(f"{weights}: the changes of {layer} are {down} and {up}, expected [r, in] and [out, r]")
    small = {size.layers for size in Ladder.parse(config["sizes"]) if size.layers < depth}
    if missing := small - {d for d in depths if f"projections.{d}.encode" in tensors}:
        raise AdapterError(f"{weights} lacks the projections of depths {sorted(missing)}")
    if beyond := {d for d in depths if d > depth}:
        raise AdapterError(f"{weights} has projections of depths {sorted(beyond)}, the model has {depth} layers")
