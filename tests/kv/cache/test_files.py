"""Caches as files: gone on with as if they had never been written, and refused where they are not what they seem."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from nestling import kv
from nestling.errors import CacheMismatchError, FileError, NestlingError
from nestling.kv import NestedCache
from nestling.kv.cache import files

from ..families import FAMILIES, MORE, nested_cache, tiny_fit, tiny_model
from .test_copies import CACHES, filled, goes_on

QUICK = ("llama-gqa", "gemma3")
EVERY = [
    pytest.param(f, marks=() if f in QUICK else pytest.mark.slow)
    for f in (*QUICK, *sorted({*FAMILIES, *MORE} - {*QUICK}))
]
KINDS = {
    **CACHES,
    "no window": dict(budget=0.6, window=0, sinks=0),
    "uniform": dict(budget=0.7, allocation="uniform", sinks=2, window=6),
    "a table": dict(budget={"keys": [[8, 16], [8, 8], [16, 16]], "values": [[16, 16], [8, 16], [16, 16]]}, window=6),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", EVERY)
def test_a_conversation_is_gone_on_with(fitted, ids, tmp_path, family, name):
    made = fitted(family)
    more = {"budget": "0.06MiB"} if name == "limited" else {}  # some families have twice the heads
    cache = filled(made, name, ids[:2, :30], **more)
    cache.save(tmp_path / "cache.safetensors")
    again = NestedCache.load(tmp_path / "cache.safetensors", made.model, made.adapter)
    assert (again.full_nbytes, again.get_seq_length(), again.budget) == (cache.full_nbytes, 30, cache.budget)
    assert again.nbytes <= cache.nbytes  # transformers' own layers keep more alive than they hold
    assert [one.nbytes for _, one in again._nested()] == [one.nbytes for _, one in cache._nested()]
    assert torch.equal(again.allocation.stacked, cache.allocation.stacked) and again.limit == cache.limit
    expected = goes_on(made.model, cache, ids[2:4, :30])
    assert torch.equal(goes_on(made.model, again, ids[2:4, :30]), expected)
    assert again.nbytes == cache.nbytes


@pytest.mark.parametrize("name", KINDS)
def test_every_storage_at_every_length(fitted, ids, tmp_path, name):
    """Empty, shorter than the sinks, within the window, over a border, after a crop, and shrunk."""
    made, path = fitted("llama-gqa"), tmp_path / "cache.safetensors"
    start = dict(context=256, **KINDS[name])
    for length, crop in ((0, 0), (1, 0), (7, 0), (24, 0), (60, 0), (60, 3), (60, 30), (20, 20)):
        cache = nested_cache(made.model, made.adapter, **start)
        with torch.no_grad():
            if length:
                made.model(input_ids=ids[:2, :length], past_key_values=cache)
        if name != "evicting":
            cache.crop(-crop)
        if cache.factory is not None and length == 24:
            cache.shrink(cache.budget * 0.95)
        cache.save(path)
        again = NestedCache.load(path, made.model, made.adapter)
        assert again.get_seq_length() == cache.get_seq_length()
        assert torch.equal(goes_on(made.model, again, ids[2:4, :30]), goes_on(made.model, cache, ids[2:4, :30]))
        if cache.factory is not None:
            for one in (cache, again):
                one.shrink(cache.factory.smallest)
            assert torch.equal(goes_on(made.model, again, ids[4:6, :30]), goes_on(made.model, cache, ids[4:6, :30]))
            again.reset()
            assert (
                again.get_seq_length() == 0 and again.budget == nested_cache(made.model, made.adapter, **start).budget
            )


RESTARTED = """
import sys, torch
from transformers import AutoModelForCausalLM
from nestling import kv
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # products of other numbers of threads round in other ways
model = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
adapter = kv.KVAdapter.from_pretrained(folder + "/adapter")
saved = torch.load(folder + "/tokens.pt")
cache = kv.NestedCache.load(folder + "/cache.safetensors", model, adapter)
with torch.no_grad():
    logits = [model(input_ids=part, past_key_values=cache).logits for part in saved["rest"].split((1, 20, 1, 8), 1)]
cache.save(folder + "/later.safetensors")
torch.save({"logits": torch.cat(logits, 1)}, folder + "/out.pt")
"""


@pytest.mark.parametrize("name", ["ranks", "bits", "evicting"])
def test_another_process_goes_on(fitted, ids, tmp_path, name):
    made = fitted("llama-gqa")
    made.model.save_pretrained(tmp_path / "model")
    made.adapter.save_pretrained(tmp_path / "adapter")
    cache = filled(made, name, ids[:1, :40])
    cache.save(tmp_path / "cache.safetensors")
    torch.save({"rest": ids[1:2, :30]}, tmp_path / "tokens.pt")
    expected = goes_on(made.model, cache, ids[1:2, :30])
    environment = os.environ | {"PYTHONPATH": str(Path(kv.__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", RESTARTED, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt")["logits"], expected)
    again = NestedCache.load(tmp_path / "later.safetensors", made.model, made.adapter)
    assert torch.equal(goes_on(made.model, again, ids[2:3, :30]), goes_on(made.model, cache, ids[2:3, :30]))


def test_drafts_may_be_taken_back_afterwards(fitted, ids, tmp_path):
    made = fitted("llama-gqa")
    cache = filled(made, "ranks", ids[:1, :40])
    cache.activate_past_recording()
    with torch.no_grad():
        made.model(input_ids=ids[1:2, :6], past_key_values=cache)
    cache.save(tmp_path / "cache")
    again = NestedCache.load(tmp_path / "cache", made.model, made.adapter)
    for one in (cache, again):
        one.crop(-4)
    assert torch.equal(goes_on(made.model, again, ids[2:3, :30]), goes_on(made.model, cache, ids[2:3, :30]))


# Other models and adapters


def test_another_model_is_refused(fitted, ids, tmp_path):
    made, path = fitted("llama-gqa"), tmp_path / "cache"
    filled(made, "bits", ids[:1, :30]).save(path)
    with pytest.raises(kv.AdapterError, match="made for another model"):
        NestedCache.load(path, fitted("qwen2").model, made.adapter)
    with pytest.raises(CacheMismatchError, match="saved for another model"):
        NestedCache.load(path, fitted("qwen2").model, fitted("qwen2").adapter)
    with pytest.raises(CacheMismatchError, match="made for another model"):
        NestedCache.load(path, tiny_model("llama-gqa", seed=1), made.adapter)
    again = NestedCache.load(path, tiny_model("llama-gqa"), made.adapter)  # the same weights
    assert again.get_seq_length() == 30


def test_a_model_is_not_switched_by_a_call_that_fails(fitted, ids, tmp_path):
    made, path = fitted("llama-gqa"), tmp_path / "cache"
    filled(made, "bits", ids[:1, :30]).save(path)
    other = tiny_model("llama-gqa", seed=1)
    with pytest.raises(CacheMismatchError):
        NestedCache.load(path, other, made.adapter)
    assert other.config._attn_implementation != "nestling" and made.model.config._attn_implementation == "nestling"
    with pytest.raises(CacheMismatchError):
        NestedCache.load(path, made.model, tiny_fit(made.model, ids[4:]))
    assert made.model.config._attn_implementation == "nestling"


@pytest.mark.parametrize("name", ["ranks", "bits", "a table"])
def test_another_adapter_is_refused(fitted, ids, tmp_path, name):
    made, path = fitted("llama-gqa"), tmp_path / "cache"
    cache = nested_cache(made.model, made.adapter, **{"context": 256, **KINDS[name]})
    with torch.no_grad():
        made.model(input_ids=ids[:1, :30], past_key_values=cache)
    cache.save(path)
    for other in (tiny_fit(made.model, ids[4:]), tiny_fit(made.model, ids, basis="pca")):
        with pytest.raises(CacheMismatchError, match="with another adapter"):
            NestedCache.load(path, made.model, other)


# Files that are not what they seem


@pytest.fixture(scope="module")
def saved(fitted, ids, tmp_path_factory):
    made, path = fitted("gemma3"), tmp_path_factory.mktemp("caches") / "cache.safetensors"
    filled(made, "bits", ids[:1, :40], keep_tokens=0.9).save(path)
    return made, path


def edited(path: Path, target: Path, change, *, sealed: bool = True) -> Path:
    """A copy of a file whose head and tensors were changed, by default with the checksum that belongs to it."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()["nestling"])
    change(head, tensors)
    if sealed:
        head["sha256"] = files._checksum(head, tensors)
    save_file(tensors, target, {"nestling": json.dumps(head)})
    return target


def test_the_file_is_plain(saved):
    """Tensors and JSON: no pickle, and neither bases nor ids of tokens."""
    made, path = saved
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()["nestling"])
        assert (head["format"], head["kind"]) == (3, "nestling-cache") and head["model"] == made.adapter.fingerprint
        assert sorted({name.split(".")[1] for name in file.keys()}) == ["0", "1", "2"]
    cache = NestedCache.load(path, made.model, made.adapter)
    assert path.stat().st_size < cache.nbytes + 40_000


@pytest.mark.parametrize("size", [0, 7, 100, -1, -1000])
def test_truncated_files_are_refused(saved, tmp_path, size):
    made, path = saved
    (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match="cut is truncated or not a safetensors file"):
        NestedCache.load(tmp_path / "cut", made.model, made.adapter)


def test_other_files_are_refused(saved, tmp_path):
    made, path = saved
    made.adapter.save_pretrained(tmp_path / "adapter")
    for other, message in (
        (tmp_path / "adapter" / "nestling_adapter.safetensors", "is not a saved NestedCache"),
        (tmp_path / "adapter" / "nestling_adapter.json", "not a safetensors file"),
        (tmp_path / "adapter", "not a file, but a folder"),
        (tmp_path / "nothing", "no such file"),
    ):
        with pytest.raises(FileError, match=message):
            NestedCache.load(other, made.model, made.adapter)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(FileError, match="flipped is damaged: its checksum differs"):
        NestedCache.load(tmp_path / "flipped", made.model, made.adapter)


def first(tensors: dict, end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def set_in(head: dict, value, *place) -> None:
    for key in place[:-1]:
        head = head[key]
    head[place[-1]] = value


HOSTILE = {
    "NaN": (lambda h, t: t[first(t, "exact.key.recent")][..., -2:].fill_(0xFF), "holds NaN or infinity"),  # its scales
    "NaN in a stock layer": (lambda h, t: t[first(t, "0.keys")].fill_(torch.nan), "holds NaN or infinity"),
    "a tensor less": (lambda h, t: t.pop(first(t, ".codes.data")), "data must be of torch.uint8 and shape"),
    "a stock tensor less": (lambda h, t: t.pop(first(t, "0.keys")), "'keys' is not what a layer of this kind has"),
    "a tensor more": (lambda h, t: t.update({"layers.1.x": torch.zeros(1)}), "unknown tensor layers.1.x"),
    "a layer more": (lambda h, t: t.update({"layers.9.x": torch.zeros(1)}), "unknown tensor layers.9.x"),
    "another dtype": (lambda h, t: t.update({first(t, "recent"): t[first(t, "recent")].double()}), "must be of torch"),
    "a shorter tensor": (lambda h, t: t.update({first(t, "codes.data"): torch.zeros(1, dtype=torch.uint8)}), "shape"),
    "another batch": (lambda h, t: set_in(h, 2, "layers", 1, "batch"), "shape"),
    "another length": (lambda h, t: set_in(h, 41, "layers", 1, "length"), "numbers of tokens that no cache of 41 has"),
    "no length": (lambda h, t: h["layers"][1].pop("length"), "'length' is missing"),
    "a huge store": (lambda h, t: set_in(h, 10**9, "layers", 1, "exact", "size"), "numbers of tokens"),
    "evicted more than there is": (lambda h, t: set_in(h, 99, "layers", 1, "hitters", "evicted"), "'evicted' must be"),
    "other tokens left": (lambda h, t: set_in(h, 3, "layers", 1, "groups.0.key.codes", "length"), "'length' must be"),
    "fewer layers": (lambda h, t: h["layers"].pop(), "damaged: 2 layers, expected 3"),
    "no layers": (lambda h, t: h.pop("layers"), "'layers' is missing"),
    "other bits": (lambda h, t: set_in(h, 1, "allocation", "keys", 0, 0, 0), "another adapter"),
    "bits that no block has": (lambda h, t: set_in(h, 9, "allocation", "keys", 0, 0, 0), "holds 9 bits"),
    "another budget": (lambda h, t: set_in(h, 0.9, "budget"), "another adapter"),
    "a budget that is none": (lambda h, t: set_in(h, "x", "budget"), "'budget' must be a finite number"),
    "an unknown option": (lambda h, t: set_in(h, 1, "options", "sink"), "sink"),
    "an option that cannot be": (lambda h, t: set_in(h, -1, "options", "sinks"), "sinks=-1"),
    "a newer format": (lambda h, t: set_in(h, 4, "format"), "has format 4, this version reads 3"),
    "an older format": (lambda h, t: set_in(h, 2, "format"), "has format 2, this version reads 3"),
    "another kind": (lambda h, t: set_in(h, "nestling-kv", "kind"), "is not a saved NestedCache"),
    "other bases": (lambda h, t: set_in(h, "0" * 64, "bases"), "its bases are not those"),
    "weights that are none": (lambda h, t: set_in(h, {"q": ["x"]}, "layers", 1, "weights"), "finite numbers"),
    "a length that is text": (lambda h, t: set_in(h, "9", "layers", 0, "cumulative_length"), "'cumulative_length' is"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(saved, tmp_path, name):
    made, path = saved
    change, message = HOSTILE[name]
    hostile = edited(path, tmp_path / "hostile", change)
    with pytest.raises(NestlingError, match=message):
        NestedCache.load(hostile, made.model, made.adapter)
    unchanged = edited(path, tmp_path / "same", lambda head, tensors: None)
    assert NestedCache.load(unchanged, made.model, made.adapter).get_seq_length() == 40


# Writing


def test_a_failed_save_leaves_the_old_file(fitted, ids, tmp_path, monkeypatch):
    made, path = fitted("llama-gqa"), tmp_path / "cache"
    filled(made, "ranks", ids[:1, :30]).save(path)
    old = path.read_bytes()
    more = filled(made, "ranks", ids[:1, :40])

    def fails(tensors, place, metadata):
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(FileError, match="make room"):
        more.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["cache"]
    with pytest.raises(FileError, match="does not exist"):
        more.save(tmp_path / "no" / "folder")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals")
def test_a_kill_in_the_middle_leaves_the_old_file(fitted, ids, tmp_path):
    made, path = fitted("llama-gqa"), tmp_path / "cache"
    cache = filled(made, "ranks", ids[:1, :30])
    cache.save(path)
    old, more = path.read_bytes(), filled(made, "ranks", ids[:1, :40])
    child = os.fork()
    if not child:  # it dies when the new file is written, but has not taken the old one's place

        def killed(tensors, place, metadata):
            save_file(tensors, place, metadata)
            os.kill(os.getpid(), signal.SIGKILL)

        files.save_file = killed
        signal.alarm(60)
        more.save(path)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == old and len(os.listdir(tmp_path)) == 2
    assert NestedCache.load(path, made.model, made.adapter).get_seq_length() == 30
    cache.save(path)  # and removes what is left of the other
    assert os.listdir(tmp_path) == ["cache"]
