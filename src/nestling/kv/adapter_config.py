"""What the JSON file of an adapter may hold: every value that is ever used is of its type and in its range."""

import re
from pathlib import Path
from typing import Any

from nestling.errors import AdapterError
from nestling.files.fields import Fields, is_number
from nestling.files.reading import read_object, short

FORMAT, KIND = 3, "nestling-kv"
LAYERS, HEADS, WIDTH = 10_000, 65_536, 65_536  # beyond those of any model
LARGEST_ERROR = 100.0  # of a quantiser, in mean squares: 1 is as bad as storing nothing
OLD_ERRORS = 5  # of as many quantisers, in format 1
SIDES = ("key", "value")


def read_config(path: Path) -> dict[str, Any]:
    """The config of an adapter; keys that are not known here are left alone.

    Raises:
        AdapterError: it cannot be read, is of another kind or a newer format, or a value is not as expected.
    """
    config = read_object(path, AdapterError)
    if config.get("kind") != KIND:
        raise AdapterError(f"{path} is not a nestling KV adapter's (kind is not {KIND!r})")
    fields = Fields(path, config, AdapterError)
    number = config.get("format")
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise AdapterError(
            f"{path} has format {short(number)}, this version reads up to {FORMAT}: upgrade nestling, or copy it again"
        )
    for key in ("sha256", "card_sha256"):
        checksum = fields.text(key, default=None)
        if checksum is not None and not re.fullmatch("[0-9a-f]{64}", checksum):
            raise AdapterError(f"{path}: {key!r} must be 64 hexadecimal digits, got {short(checksum)}")
    for key in ("nestling", "card", "base_model"):
        fields.text(key, default=None)
    _check_basis(path, config.get("basis"))
    for key in ("tokens", "length", "skip", "sinks", "window", "context"):
        fields.whole(key, default=None)
    fields.number("condition", 0, default=None)
    try:
        _check_model(fields.object("model"))
    except AdapterError as error:
        raise AdapterError(f"{error}: 'model' must hold layers, num_key_value_heads and head_dim") from None
    if (errors := fields.object("errors", default=None)) is not None:
        for side in SIDES:
            if max(errors.numbers(side, OLD_ERRORS, 0)) > LARGEST_ERROR:
                raise AdapterError(f"{errors.where}: {side!r} must be at most {LARGEST_ERROR:g}")
    if (search := fields.object("search", default=None)) is not None:
        search.text("method")
        search.whole("forwards", default=None)
    if (training := fields.object("training", default=None)) is not None:
        _check_training(training)
    if (measured := fields.object("measured", default=None)) is not None:
        _check_measured(measured)
    return config


def basis_of(info: dict) -> str:
    """The bases of an adapter in a few words, by its ``info``: ``"pca"``, ``"balanced for 41 of 60, PCA for 19"``."""
    basis = info.get("basis", "unknown")
    if isinstance(basis, str):
        return basis
    names = [name for side in SIDES for name in basis[side]]
    return f"balanced for {names.count('balanced')} of {len(names)}, PCA for {names.count('pca')}"


def _check_basis(path: Path, basis: Any) -> None:
    """The name of the basis of all layers, or those of each layer by side."""
    if isinstance(basis, str | None):
        return
    by_side = [basis.get(side) for side in SIDES] if isinstance(basis, dict) else [None]
    if all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in by_side):
        return
    raise AdapterError(f"{path}: 'basis' must be a name, or lists of names by side, got {short(basis)}")


def _check_model(model: Fields) -> None:
    model.whole("num_key_value_heads", 1, HEADS)
    model.whole("head_dim", 1, WIDTH)
    layers = model.array("layers")
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < LAYERS for layer in layers)
    if not layers or not whole or sorted(set(layers)) != layers:
        raise AdapterError(f"{model.where}: 'layers' must be numbers of layers in order, got {short(layers)}")
    model.text("model_type")
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        model.whole(key, 1)
    model.object("rope")


def _check_measured(measured: Fields) -> None:
    """What a card tells of the caches."""
    for key in ("length", "windows"):
        measured.whole(key, 1)
    for row in measured.objects("rows"):
        row.number("budget", 1e-6, 1)
        for name in ("bytes_share", "kl", "kl_99", "kl_first", "kl_last"):
            row.number(name)
        if "predicted" in row.values:
            row.number("predicted", 0)


def _check_training(training: Fields) -> None:
    """What a card and a report tell of a training."""
    for key in ("preset", "sampling", "allocation"):
        training.text(key)
    for key in ("sinks", "window", "tokens", "seconds"):
        training.whole(key)
    training.number("learning_rate", 0)
    for point in training.objects("curve"):
        for name, value in point.values.items():
            if not is_number(value):
                raise AdapterError(f"{point.where}: {short(name)} must be a finite number, got {short(value)}")
            if name.startswith("kl_") and not re.fullmatch(r"kl_\d{1,9}(\.\d{1,9})?(e-?\d{1,2})?", name, re.ASCII):
                raise AdapterError(f"{point.where}: {short(name)} must end in a share of the ranks, such as kl_0.5")
        point.whole("tokens")
