"""What the JSON of an adapter may hold: each value that is ever used has a type and a range."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nestling.errors import AdapterError
from nestling.kv import KVAdapter

CONFIG, WEIGHTS = "nestling_adapter.json", "nestling_adapter.safetensors"
TRAINING = {"preset": "default", "sampling": "path", "allocation": "energy", "sinks": 4, "window": 64, "tokens": 64,
            "seconds": 3, "learning_rate": 0.002, "curve": [{"step": 0, "tokens": 0, "kl_0.5": 0.2}]}  # fmt: skip
MEASURED = dict.fromkeys(("budget", "bytes_share", "kl", "kl_99", "kl_first", "kl_last"), 0.25)

ERRORS = dict.fromkeys(("key", "value"), [0.4, 0.12, 0.04, 0.01, 1e-4])  # as in format 1


@pytest.fixture
def folder(fitted, tmp_path) -> Path:
    fitted("llama-gqa").adapter.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", training=TRAINING, errors=ERRORS)
    return tmp_path / "adapter"


def change(folder: Path, **changes) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        holder = config
        for key in outer:
            holder = holder[key]
        holder[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": True},
        {"format": -1},
        {"sha256": 3},
        {"sha256": "x" * 64},
        {"card": []},
        {"base_model": {"a": 1}},
        {"basis": 1},
        {"tokens": "many"},
        {"tokens": 10**400},
        {"length": -1},
        {"sinks": 4.5},
        {"window": True},
        {"condition": "bad"},
        {"condition": float("nan")},
        {"errors": 3},
        {"errors": {}},
        {"errors__key": [0.1]},
        {"errors__key": [0.1, 0.1, 0.1, 0.1, [0.1]]},
        {"errors__value": [0.1, 0.1, 0.1, 0.1, -0.1]},
        {"errors__value": [0.1, 0.1, 0.1, 0.1, 1e30]},
        {"errors__value": [0.1, 0.1, 0.1, 0.1, 10**400]},
        {"search": 3},
        {"search": {"method": []}},
        {"search": {"method": "blend", "forwards": "many"}},
        {"training": 5},
        {"training": {}},
        {"training__curve": [3]},
        {"training__curve": [{"tokens": 1, "kl_x": 1}]},
        {"training__curve": [{"tokens": "1", "kl_0.5": 1}]},
        {"training__curve": [{"kl_0.5": 1}]},
        {"training__learning_rate": None},
        {"training__seconds": -3},
        {"measured": 3},
        {"measured": {"length": 0, "windows": 1, "rows": []}},
        {"measured": {"length": 9, "windows": 1, "rows": [3]}},
        {"measured": {"length": 9, "windows": 1, "rows": [{**MEASURED, "kl": "low"}]}},
        {"measured": {"length": 9, "windows": 1, "rows": [{**MEASURED, "predicted": -1}]}},
        {"measured": {"length": 9, "windows": 1, "rows": [{**MEASURED, "budget": 0}]}},
        {"model__layers": [0, 0, 0]},
        {"model__layers": [True, 1, 2]},
        {"model__layers": [2, 1, 0]},
        {"model__layers": [0, 1, 10**30]},
        {"model__head_dim": True},
        {"model__num_key_value_heads": 2.0},
        {"model__rope": []},
        {"model__model_type": None},
        {"model__hidden_size": 0},
    ],
)
def test_a_value_of_another_type_or_range(folder, changes):
    assert KVAdapter.from_pretrained(folder).info["training"] == TRAINING
    change(folder, **changes)
    with pytest.raises(AdapterError, match=CONFIG) as error:
        KVAdapter.from_pretrained(folder)
    assert len(str(error.value)) < 500


def test_what_is_not_known_is_left_alone(folder):
    change(folder, note={"of": ["mine"]}, training__note="x", model__note=[1])
    assert KVAdapter.from_pretrained(folder).info["note"] == {"of": ["mine"]}


@pytest.mark.parametrize("card", [b"\xff\xfe\x00", b"\xc3"])
def test_a_card_that_is_no_text(folder, card):
    (folder / "README.md").write_bytes(card)
    with pytest.raises(AdapterError, match="README.md"):
        KVAdapter.from_pretrained(folder)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_holes(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("spoil", [as_pipe, as_device, as_folder, as_holes])
def test_what_is_no_file(folder, name, spoil):
    spoil(folder / name)
    with pytest.raises(AdapterError, match=name):
        KVAdapter.from_pretrained(folder)


@pytest.mark.parametrize("spoil", ["integers", "infinite", "singular", "negative step"])
def test_weights_that_are_none(folder, spoil):
    """Of an adapter without a checksum, as older ones are."""
    change(folder, sha256=None)
    tensors = load_file(folder / WEIGHTS)
    name = "layers.1.key.step" if spoil == "negative step" else "layers.1.key.encode"
    tensors[name] = {
        "integers": lambda x: x.round().int(),
        "infinite": lambda x: x / 0,
        "singular": lambda x: x * 0,
        "negative step": lambda x: -x,
    }[spoil](tensors[name])
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="adapter"):
        KVAdapter.from_pretrained(folder)
