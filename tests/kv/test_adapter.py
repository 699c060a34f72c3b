"""Adapters on disk: what is written is what is read, whole or not at all, and nothing else is accepted."""

import json
import os
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling import kv
from nestling.errors import AdapterError, FileError
from nestling.files.folders import sha256
from nestling.kv import adapter_files as files
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import CONFIG_FILE, OLD_CONFIG_FILE, OLD_NAMES, OLD_WEIGHTS_FILE, WEIGHTS_FILE
from nestling.kv.integration.attach import cached
from nestling.kv.quantisation.quantiser import WIDTHS

from .families import nested_cache, tiny_model


@pytest.fixture(scope="module")
def made(fitted):
    return fitted("llama-gqa")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    made.adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes) -> None:
    """Change the config; dotted names (with __) reach into ``model``."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        place, key = (config["model"], name[7:]) if name.startswith("model__") else (config, name)
        place.pop(key, None) if value is None else place.__setitem__(key, value)
    path.write_text(json.dumps(config), encoding="utf-8")


def same(a: KVAdapter, b: KVAdapter) -> bool:
    tensors = all(
        torch.equal(getattr(a, n)[s], getattr(b, n)[s])
        for n in ("encode", "mean", "drop_cost")
        for s in ("key", "value")
    )
    return tensors and (a.fingerprint, a.info) == (b.fingerprint, b.info)


# Round trip


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3", "partial-rotary"])
def test_what_is_saved_is_what_is_loaded(fitted, ids, tmp_path, family):
    made = fitted(family)
    made.adapter.save_pretrained(tmp_path / "deep" / "adapter")
    again = KVAdapter.from_pretrained(str(tmp_path / "deep" / "adapter"))
    assert same(again, made.adapter)
    with torch.no_grad():
        exact = dict(sinks=2, window=6, exact_prompt=False)  # the mean of keys matters beside exact tokens
        for budget, options in ((0.6, {"paper": True}), (0.9, {"paper": True}), (0.6, exact), (0.9, exact)):
            out = []
            for adapter in (made.adapter, again):
                cache = nested_cache(made.model, adapter, budget, **options)
                out.append(made.model(input_ids=ids[:1, :24], **cached(made.model, cache)).logits)
            assert torch.equal(*out)


def test_an_adapter_is_two_files_and_a_card(made, folder):
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    assert (config["format"], config["kind"], config["basis"]) == (3, "nestling-kv", "balanced")
    assert config["model"] == made.adapter.fingerprint
    tensors = load_file(folder / WEIGHTS_FILE)
    assert len(tensors) == 5 * 2 * 3 + 3
    shapes = {"encode": (2, 16, 16), **dict.fromkeys(("mean", "drop_cost", "step"), (2, 16))}
    shapes["quantisation_cost"] = (2, 16, 1 + len(WIDTHS))
    for row, layer in enumerate(made.adapter.fingerprint["layers"]):
        drift = tensors.pop(f"layers.{layer}.key.drift")
        assert drift.shape == (2, 2, 16) and torch.equal(drift, made.adapter.drift[row])
        for side in ("key", "value"):
            for name, shape in shapes.items():
                tensor = tensors.pop(f"layers.{layer}.{side}.{name}")
                assert tensor.shape == shape and tensor.dtype == torch.float32
                assert torch.equal(tensor, getattr(made.adapter, name)[side][row])
    assert not tensors
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: nestling") and "`llama` model with 3 compressed layers" in card


@pytest.mark.parametrize("sampling, of", [("path", "the ranks"), ("bits", "16 bits")])
def test_the_card_of_a_trained_one_says_what_was_measured(made, tmp_path, sampling, of):
    curve = [{"tokens": 0, "kl_0.5": 0.25}, {"tokens": 64}, {"tokens": 4096, "kl_0.5": 0.125}]
    training = {"preset": "default", "learning_rate": 0.002, "seconds": 3, "sinks": 4, "window": 64, "curve": curve}
    info = {**made.adapter.info, "training": {**training, "sampling": sampling}}
    replace(made.adapter, info=info).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert (
        f"at shares of {of}" in card and "NestedCache(model, adapter, 0.25)" in card and "| 4,096 | 0.1250 |" in card
    )


def test_its_size_is_known_before_it_is_made(made, folder):
    bound, real = files.expected_bytes(made.model), (folder / WEIGHTS_FILE).stat().st_size
    assert 0.5 * real < bound <= real
    assert files.expected_bytes(torch.nn.Linear(2, 2)) == 0


def test_a_card_is_kept(folder):
    (folder / "README.md").write_text("measured: ½\n", encoding="utf-8")
    adapter = KVAdapter.from_pretrained(folder)
    adapter.save_pretrained(folder)
    assert (folder / "README.md").read_text("utf-8") == "measured: ½\n"
    (folder / "README.md").unlink()
    assert KVAdapter.from_pretrained(folder).card == ""


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_can_read_it(made, tmp_path):
    """A folder made by mkdtemp is private; an adapter has the permissions of any other folder."""
    made.adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "adapter").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Writing


ADAPTER = sorted(["README.md", CONFIG_FILE, WEIGHTS_FILE])
CARDLESS = sorted(["nestling_adapter.md", CONFIG_FILE, WEIGHTS_FILE])


def other(made) -> KVAdapter:
    mean, drop_cost = (
        {s: t * 2 for s, t in tensors.items()} for tensors in (made.adapter.mean, made.adapter.drop_cost)
    )
    return KVAdapter(made.adapter.fingerprint, made.adapter.encode, mean, drop_cost)


def test_saving_replaces_an_adapter(made, folder):
    new = other(made)
    new.save_pretrained(folder)
    assert same(KVAdapter.from_pretrained(folder), new)
    assert os.listdir(folder.parent) == ["adapter"]
    (folder.parent / "empty").mkdir()
    new.save_pretrained(folder.parent / "empty")
    assert same(KVAdapter.from_pretrained(folder.parent / "empty"), new)


@pytest.mark.parametrize("when", ["weights", "card", "rename 1", "rename 2", "rename 3"])
def test_a_failed_save_leaves_the_old_adapter_whole(made, folder, monkeypatch, when):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if when == "weights":
        monkeypatch.setattr(files, "save_file", fail)
    elif when == "card":
        monkeypatch.setattr(files, "_default_card", fail)
    else:
        move, calls = Path.replace, []

        def failing(self, target):
            calls.append(target)
            return fail() if len(calls) == int(when[-1]) else move(self, target)

        monkeypatch.setattr(Path, "replace", failing)
    card = "another card"  # so that the third one is of the config
    with pytest.raises(FileError, match="no space"):
        replace(other(made), card="" if when == "card" else card).save_pretrained(folder)
    monkeypatch.undo()
    assert same(KVAdapter.from_pretrained(folder), made.adapter)
    assert os.listdir(folder.parent) == ["adapter"] and sorted(os.listdir(folder)) == ADAPTER


@pytest.mark.parametrize("call", [4, 5])
def test_a_save_that_ends_behind_its_head_is_the_new_one(made, folder, monkeypatch, call):
    """The config is in place: weights and card are found under their other names until they are."""
    move, calls, new = Path.replace, [], replace(other(made), card="new")

    def failing(self, target):
        calls.append(target)
        if len(calls) >= call:
            raise OSError("no space left on device")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    new.save_pretrained(folder)
    monkeypatch.undo()
    assert same(KVAdapter.from_pretrained(folder), new) and sorted(os.listdir(folder)) != ADAPTER
    new.save_pretrained(folder)
    assert same(KVAdapter.from_pretrained(folder), new) and sorted(os.listdir(folder)) == ADAPTER
    assert KVAdapter.from_pretrained(folder).card == "new"


def test_other_files_stay(made, tmp_path):
    """A LoRA's, notes and folders, also under the names that adapters had; and a README that is not the adapter's."""
    mine = {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "weights", "notes.txt": "x"}
    mine |= {"README.md": "of the LoRA", "checkpoint-100/optimizer.pt": "state", ".hidden": "y"}
    (tmp_path / "checkpoint-100").mkdir()
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    for adapter in (made.adapter, other(made)):
        adapter.save_pretrained(tmp_path)
        assert same(KVAdapter.from_pretrained(tmp_path), adapter)
        assert {name: (tmp_path / name).read_text() for name in mine} == mine
        ours = {"nestling_adapter.json", "nestling_adapter.safetensors", "nestling_adapter.md"}
        assert {*os.listdir(tmp_path)} == {name.split("/")[0] for name in mine} | ours
        assert "compressed layers" in KVAdapter.from_pretrained(tmp_path).card


def test_a_card_that_was_edited_stays(made, folder):
    edited = (folder / "README.md").read_text("utf-8") + "\nI measured this again."
    (folder / "README.md").write_text(edited, "utf-8")
    replace(other(made), card="new").save_pretrained(folder)
    assert (folder / "README.md").read_text("utf-8") == edited
    assert KVAdapter.from_pretrained(folder).card == "new"


OLD_ERRORS = {"key": [0.4, 0.12, 0.04, 0.01, 1e-4], "value": [0.36, 0.11, 0.03, 0.012, 2e-4]}  # at 1, 2, 3, 4, 8 bits


def old_tensors(folder: Path) -> None:
    """An adapter as it was saved before its costs had names of their own, and one for each width: with the noise of
    coordinates, here what they cost at 2 bits, and the errors of quantisers."""
    renamed = load_file(folder / WEIGHTS_FILE)
    for name in [*renamed]:
        if name.endswith(".quantisation_cost"):
            renamed[name] = renamed[name][..., 2].contiguous()
        for old, new in OLD_NAMES.items():
            if name.endswith(f".{new}"):
                renamed[name.removesuffix(new) + old] = renamed.pop(name)
    save_file(renamed, folder / WEIGHTS_FILE)
    edit(folder, format=1, errors=OLD_ERRORS, sha256=sha256(folder / WEIGHTS_FILE))


def old_names(folder: Path) -> None:
    """An adapter as it was saved before its files had names of their own."""
    old_tensors(folder)
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    for name in ("sha256", "card", "card_sha256"):
        del config[name]
    (folder / CONFIG_FILE).unlink()
    (folder / OLD_CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    (folder / WEIGHTS_FILE).rename(folder / OLD_WEIGHTS_FILE)


def test_old_names_of_costs_are_read_in_the_first_format_alone(made, folder):
    old_tensors(folder)
    assert {"layers.0.key.energy", "layers.0.key.noise"} < load_file(folder / WEIGHTS_FILE).keys()
    again = KVAdapter.from_pretrained(folder)
    assert same(again, made.adapter) and again.quantises
    for side in ("key", "value"):
        noise, (one, two, three, four, eight) = made.adapter.quantisation_cost[side][..., 2], OLD_ERRORS[side]
        shares = torch.tensor([one, two, three, four, four, four, four, eight])  # nothing is known of 5, 6 and 7 bits
        torch.testing.assert_close(again.quantisation_cost[side][..., 1:], noise[..., None] * shares)
        assert torch.equal(again.quantisation_cost[side][..., 0], again.drop_cost[side])
        assert torch.equal(again.step[side], made.adapter.step[side])
    for share in (0.5, 0.25, 0.125):  # so they are not used
        assert not {5, 6, 7} & {*again.allocate(share).stacked.flatten().tolist()}
    edit(folder, errors=None)
    unquantised = KVAdapter.from_pretrained(folder)
    assert same(unquantised, made.adapter) and not unquantised.quantises
    edit(folder, format=2)
    with pytest.raises(AdapterError, match=r"lacks 6 tensors, first layers\.0\.key\.drop_cost"):
        KVAdapter.from_pretrained(folder)


def test_without_costs_at_no_bits_they_are_the_drop_costs(made, folder):
    """Format 2."""
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({n: t[..., 1:].contiguous() if n.endswith(".quantisation_cost") else t for n, t in tensors.items()},
              folder / WEIGHTS_FILE)  # fmt: skip
    edit(folder, format=2, sha256=sha256(folder / WEIGHTS_FILE))
    again = KVAdapter.from_pretrained(folder)
    for side, costs in made.adapter.quantisation_cost.items():
        assert torch.equal(again.quantisation_cost[side][..., 1:], costs[..., 1:])
        assert torch.equal(again.quantisation_cost[side][..., 0], made.adapter.drop_cost[side])
    edit(folder, format=3)
    with pytest.raises(AdapterError, match=r"quantisation_cost has shape \[2, 16, 8\], expected \[2, 16, 9\]"):
        KVAdapter.from_pretrained(folder)


def test_old_names_are_read_and_replaced(made, folder):
    old_names(folder)
    (folder / "notes.txt").write_text("mine")
    assert same(KVAdapter.from_pretrained(folder), made.adapter)
    new = other(made)
    new.save_pretrained(folder)
    assert same(KVAdapter.from_pretrained(folder), new)
    assert sorted(os.listdir(folder)) == sorted([*ADAPTER, "notes.txt"])


def test_what_peft_has_under_the_old_names_stays(made, folder):
    """A LoRA that was saved over an old adapter: the config is PEFT's by now."""
    old_names(folder)
    (folder / OLD_CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    made.adapter.save_pretrained(folder)
    assert {OLD_CONFIG_FILE, OLD_WEIGHTS_FILE} < {*os.listdir(folder)}
    save_file({"base_model.lora_A.weight": torch.zeros(2, 2)}, folder / OLD_WEIGHTS_FILE)
    (folder / OLD_CONFIG_FILE).write_text(
        '{"kind": "nestling-kv"}'
    )  # weights that are not ours beside a config that is
    made.adapter.save_pretrained(folder)
    assert (folder / OLD_WEIGHTS_FILE).is_file()


@pytest.mark.parametrize("name, content", [(CONFIG_FILE, '{"kind": "theirs"}'), (CONFIG_FILE, None)])
def test_what_is_not_ours_under_our_names_is_refused(made, tmp_path, name, content):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(AdapterError, match=f"{name} is not .*choose another folder"):
        made.adapter.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [name] and (content is None or (tmp_path / name).read_text() == content)


def test_a_file_is_not_replaced_by_a_folder(made, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(FileError, match="file"):
            made.adapter.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "x" and os.listdir(tmp_path) == ["file"]


def test_weights_of_another_save_are_refused(made, folder, tmp_path):
    other(made).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is not what was saved"):
        KVAdapter.from_pretrained(folder)
    content = bytearray((tmp_path / "other" / WEIGHTS_FILE).read_bytes())
    content[-7] ^= 1  # a bit of the last number's fraction
    (tmp_path / "other" / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match="sha256"):
        KVAdapter.from_pretrained(tmp_path / "other")


def test_pushing_uploads_the_saved_files(made, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = KVAdapter.from_pretrained(folder_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert made.adapter.push_to_hub("me/mine", token="secret") == "https://hub/me/mine"
    assert same(uploaded["me/mine"], made.adapter)


@pytest.mark.parametrize(
    "there, names", [((), ADAPTER), (("README.md",), CARDLESS), (("README.md", CONFIG_FILE), ADAPTER)]
)
def test_pushing_leaves_the_card_of_another_model(made, monkeypatch, there, names):
    uploaded = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return ""

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded.extend(sorted(os.listdir(folder_path)))
            if repo_id == "me/closed":
                raise ConnectionError("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo_id, name, token: name in there)
    made.adapter.push_to_hub("me/mine")
    assert uploaded == names
    with pytest.raises(AdapterError, match="me/closed cannot be written to .*403"):
        made.adapter.push_to_hub("me/closed")


# Reading


def test_a_missing_folder_or_file_is_named(folder, tmp_path):
    with pytest.raises(AdapterError, match="nowhere is neither an adapter folder nor a hub id"):
        KVAdapter.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=f"{CONFIG_FILE} is missing"):
        KVAdapter.from_pretrained(tmp_path / "empty")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is missing"):
        KVAdapter.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"kind": "peft"}', b"[" * 100_000, b'{"kind": "nestling-kv"}'],
)
def test_what_is_no_config_is_refused(folder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        KVAdapter.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 4}, "has format 4, this version reads up to 3: upgrade"),
        ({"format": None}, "has format None"),
        ({"format": "1"}, "has format '1'"),
        ({"kind": "lora"}, "kind is not 'nestling-kv'"),
        ({"model": None}, "must hold layers"),
        ({"model": []}, "must hold layers"),
        ({"model__layers": []}, "must hold layers"),
        ({"model__layers": [0, "1"]}, "must hold layers"),
        ({"model__layers": [0, -1]}, "must hold layers"),
        ({"model__head_dim": 0}, "must hold layers"),
        ({"model__head_dim": 10**12}, "must hold layers"),
        ({"model__head_dim": "16"}, "must hold layers"),
        ({"model__num_key_value_heads": None}, "must hold layers"),
        ({"model__layers": [0, 1, 7]}, "lacks 11 tensors, first layers.7.key.drift"),
        ({"model__layers": [0, 1]}, "holds 11 unknown tensors, first layers.2.key.drift"),
        ({"model__head_dim": 8}, r"layers.0.key.encode has shape \[2, 16, 16\], expected \[2, 8, 8\]"),
        ({"model__num_key_value_heads": 4}, r"has shape \[2, 16, 16\], expected \[4, 16, 16\]"),
    ],
)
def test_wrong_configs_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        KVAdapter.from_pretrained(folder)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HOSTILE = {
    "empty": b"",
    "short": b"\x01",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "pickle": pickle.dumps({"a": 1}),
    "endless header": header(b"{}", 2**63),
    "header beyond the file": header(b"{}", 1000),
    "no json": header(b"{{{{"),
    "data beyond the file": header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "huge shape": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}') + b"\0" * 4,
    "backwards": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + b"\0" * 4,
    "overlap": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + b"\0" * 4,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_refused(folder, kind):
    (folder / WEIGHTS_FILE).write_bytes(HOSTILE[kind])
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is truncated or not a safetensors file"):
        KVAdapter.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, share):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: int(share * len(content))])
    with pytest.raises(AdapterError, match="is truncated"):
        KVAdapter.from_pretrained(folder)


def broken(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS_FILE)
    edit(folder, sha256=sha256(folder / WEIGHTS_FILE))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["layers.1.key.encode"][0, 0].fill_(torch.nan), "key encode: holds NaN"),
        (lambda t: t["layers.1.value.drop_cost"][0].fill_(torch.inf), "value drop_cost: holds NaN or infinity"),
        (lambda t: t["layers.1.value.encode"][1, :, 3].zero_(), "value encode: a basis is singular"),
        (lambda t: t["layers.1.key.encode"].zero_(), "key encode: a basis is singular"),
        (lambda t: t["layers.2.key.mean"][1, 3:4].fill_(torch.nan), "key mean: holds NaN or infinity"),
        (lambda t: t["layers.0.value.mean"][0, :1].fill_(-torch.inf), "value mean: holds NaN or infinity"),
        (lambda t: t.pop("layers.1.key.encode"), "lacks 1 tensors, first layers.1.key.encode"),
        (lambda t: t.pop("layers.2.value.mean"), "lacks 1 tensors, first layers.2.value.mean"),
        (lambda t: [t.pop(n) for n in list(t) if n.endswith("mean")], "lacks 6 tensors, first layers.0.key.mean"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds 1 unknown tensors, first extra"),
        (lambda t: t.update({"layers.0.key.encode": torch.zeros(2, 16, 8)}), r"has shape \[2, 16, 8\]"),
        (lambda t: t.update({"layers.0.key.drop_cost": torch.zeros(16)}), r"has shape \[16\], expected \[2, 16\]"),
        (lambda t: t.update({"layers.0.key.mean": torch.zeros(16)}), r"key.mean has shape \[16\], expected \[2, 16\]"),
        (lambda t: t.update({"layers.1.value.mean": torch.zeros(2, 1, 16)}), r"value.mean has shape \[2, 1, 16\]"),
        (lambda t: t.update({"layers.1.value.mean": torch.zeros(1, 16)}), r"value.mean has shape \[1, 16\]"),
    ],
)
def test_wrong_tensors_are_refused(folder, change, message):
    broken(folder, change)
    with pytest.raises(AdapterError, match=message):
        KVAdapter.from_pretrained(folder)


def test_weights_of_a_peft_adapter_are_foreign(folder):
    save_file({"base_model.lora_A.weight": torch.zeros(2, 2)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="lacks 18 tensors"):
        KVAdapter.from_pretrained(folder)


def test_tensors_in_memory_are_checked_too(made):
    encode = dict(made.adapter.encode, key=made.adapter.encode["key"][:, :1])
    with pytest.raises(AdapterError, match=r"key encode: shape \[3, 1, 16, 16\], expected \[3, 2, 16, 16\]"):
        KVAdapter(made.adapter.fingerprint, encode, made.adapter.mean, made.adapter.drop_cost)
    mean = dict(made.adapter.mean, value=made.adapter.mean["value"][..., :8])
    with pytest.raises(AdapterError, match=r"value mean: shape \[3, 2, 8\], expected \[3, 2, 16\]"):
        KVAdapter(made.adapter.fingerprint, made.adapter.encode, mean, made.adapter.drop_cost)
    mean = dict(made.adapter.mean, key=made.adapter.mean["key"] / 0)
    with pytest.raises(AdapterError, match="key mean: holds NaN or infinity"):
        KVAdapter(made.adapter.fingerprint, made.adapter.encode, mean, made.adapter.drop_cost)


def test_decode_is_the_inverse(made):
    for side in ("key", "value"):
        product = made.adapter.encode[side] @ made.adapter.decode[side]
        torch.testing.assert_close(product, torch.eye(16).expand_as(product), rtol=0, atol=1e-5)


# Use


@pytest.mark.parametrize(
    "family, overrides, differs",
    [
        ("qwen2", {}, "model_type: adapter llama, model qwen2"),
        ("llama-mha", {}, "num_key_value_heads: adapter 2, model 4"),
        ("llama-gqa", {"num_hidden_layers": 2}, "num_hidden_layers: adapter 3, model 2"),
        ("llama-gqa", {"head_dim": 8}, "head_dim: adapter 16, model 8"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope: "),
    ],
)
def test_another_model_is_refused_and_left_alone(made, family, overrides, differs):
    model = tiny_model(family, **overrides)
    with pytest.raises(AdapterError, match=f"another model .*{differs}"):
        nested_cache(model, made.adapter, 0.5)
    assert model.config._attn_implementation != "nestling"


def test_the_same_architecture_with_other_weights_is_served(made):
    nested_cache(tiny_model("llama-gqa", seed=1), made.adapter, 0.6)  # a fine-tuned model


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_shares_are_of_the_stored_precision(made, ids, dtype, itemsize):
    full = made.adapter.full_elements
    assert full == 2 * 3 * 2 * 16
    options = dict(dtype=dtype, sinks=0, window=0)
    for share in (0.55, 0.8, 1.0):
        cache = nested_cache(made.model, made.adapter, share, **options)
        assert cache.share == cache.full_nbytes == 0
        assert share * full - 8 < cache.allocation.bits / 16 <= share * full
        with torch.no_grad():
            made.model(input_ids=ids[:1, :48], **cached(made.model, cache))
        assert cache.nbytes == cache.allocation.bits // 16 * itemsize * 48 <= share * full * itemsize * 48
        assert cache.full_nbytes == full * itemsize * 48 and cache.share == cache.allocation.bits / 16 / full


def test_one_adapter_makes_caches_of_every_budget(made):
    before = {s: made.adapter.encode[s].clone() for s in ("key", "value")}
    caches = [nested_cache(made.model, made.adapter, b, sinks=0, window=0) for b in (0.5, 0.6, 0.75, 1.0)]
    tables = [c.allocation for c in caches]
    for small, large in zip(tables, tables[1:], strict=False):
        assert small.bits < large.bits
        assert (small.keys <= large.keys).all() and (small.values <= large.values).all()
    assert tables[-1].bits == 16 * made.adapter.full_elements
    assert all(torch.equal(before[s], made.adapter.encode[s]) for s in before)


def test_sinks_and_window_are_paid_for(made):
    elements = [
        nested_cache(made.model, made.adapter, 0.8, context=200, **o).allocation.bits / 16
        for o in ({"sinks": 0, "window": 0}, {"sinks": 4, "window": 0}, {"sinks": 4, "window": 40})
    ]
    assert elements[0] >= elements[1] > elements[2]
    for count, exact in zip(elements, (0, 4, 4 + 40 + 15), strict=True):  # 16 recent tokens are encoded at once
        assert exact * 192 + (200 - exact) * count <= 0.8 * 200 * 192


def test_paper_compresses_everything(made):
    cache = nested_cache(made.model, made.adapter, 0.6, paper=True)
    assert all(layer.exact is None for layer in cache.layers)
    assert not any(layer.exact_prompt for layer in cache.layers)
    assert cache.allocation.bits == nested_cache(made.model, made.adapter, 0.6, sinks=0, window=0).allocation.bits


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.2}, r"smallest possible, 0\.5132"),
        ({"budget": 0.7, "allocation": "best"}, "must be 'energy', 'uniform', 'layer' or a table, got 'best'"),
        ({"budget": {"keys": [[8]], "values": [[8]]}, "limit": "1MiB"}, "an allocation is a budget by itself"),
        ({"budget": {"keys": [[8]], "values": [[8]]}}, r"keys is \[1, 1, 2\], expected \[3, 2, 2\]"),
        (
            {"budget": {"keys": [[8, 17]] * 3, "values": [[8, 8]] * 3}},
            "ranks must be multiples of 8 or the whole width, 16: got 17",
        ),
        ({"budget": 0.7, "window": 4096}, "must be longer than the 4115 exact tokens"),
    ],
)
def test_impossible_caches_are_refused(made, options, message):
    with pytest.raises(kv.BudgetError, match=message):
        nested_cache(made.model, made.adapter, **options)


def test_an_allocation_is_used_as_it_is(made, ids):
    table = {"keys": [[8, 16], [8, 8], [16, 16]], "values": [[8, 8], [16, 8], [16, 16]]}
    cache = nested_cache(made.model, made.adapter, table, sinks=0, window=0)
    with torch.no_grad():
        made.model(input_ids=ids[:1, :24], **cached(made.model, cache))
    assert cache.allocation.coordinates.tolist() == [table["keys"], table["values"]]
    again = nested_cache(made.model, made.adapter, cache.allocation.to_dict(), sinks=0, window=0)
    assert torch.equal(again.allocation.stacked, cache.allocation.stacked)
    stored = [
        sorted(tuple(r.data.shape[0:4:3] if r.dim == 2 else r.data.shape[::2]) for g in layer.groups for r in g.rows)
        for layer in cache.layers
    ]
    assert stored == [[(1, 8), (1, 8), (1, 8), (1, 16)], [(1, 8), (1, 8), (1, 8), (1, 16)], [(2, 16), (2, 16)]]


def test_half_precision_is_half_the_bytes_and_exact_at_full_rank(fitted, tmp_path):
    made = fitted("llama-gqa").adapter
    made.save_pretrained(tmp_path / "whole")
    made.save_pretrained(tmp_path / "half", half=True)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("whole", "half")]
    saved = sum(2 * tensor.numel() for tensor in (*made.encode.values(), made.drift))
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=200)  # of bases alone: a bit of the head beside them
    read = KVAdapter.from_pretrained(tmp_path / "half")
    for side in ("key", "value"):
        torch.testing.assert_close(read.encode[side], made.encode[side], rtol=1e-3, atol=1e-4)
        eye = torch.eye(read.shape[2]).expand_as(read.encode[side])
        torch.testing.assert_close(read.encode[side] @ read.decode[side], eye, rtol=0, atol=1e-5)
    large = replace(made, encode={**made.encode, "key": made.encode["key"] * 1e6})
    with pytest.raises(AdapterError, match=r"layers.*key.encode does not fit into fp16"):
        large.save_pretrained(tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("name", files.built_in())
def test_built_in_adapters_are_small_trained_and_whole(name):
    adapter = KVAdapter.from_pretrained(name)
    size = sum(path.stat().st_size for path in (files.BUILT_IN / name).iterdir())
    assert size <= 2_600_000 and "KL to the full model on held-out text" in adapter.card
    curve = [p for p in adapter.info["training"]["curve"] if "kl_0.25" in p]
    assert curve[-1]["kl_0.25"] < 0.9 * curve[0]["kl_0.25"]
    for share in (1, 0.5, 0.25):
        assert adapter.allocate(share).bits <= 16 * share * adapter.full_elements
