"""Copies of a cache: pickled, saved, sent to other processes, used by other instances of the model and by threads."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from nestling import kv
from nestling.kv.cache.bases import LayerBases

from ..families import nested_cache, tiny_fit, tiny_model

CACHES = {
    "full": dict(budget=1.0),
    "ranks": dict(budget=0.6, sinks=2, window=6),
    "bits": dict(budget=0.4, quantise=True, sinks=2, window=6),
    "evicting": dict(budget=0.8, keep_tokens=0.6, sinks=2, window=6),
    "limited": dict(budget="0.05MiB", quantise=True, sinks=2, window=6),
}


def filled(made, name: str, text, **options):
    cache = nested_cache(made.model, made.adapter, **{"context": 256, **CACHES[name], **options})
    with torch.no_grad():
        made.model(input_ids=text, past_key_values=cache)
    return cache


@torch.no_grad()
def goes_on(model, cache, text) -> torch.Tensor:
    """Logits of tokens read one, then several at a time."""
    parts = [
        model(input_ids=part, past_key_values=cache).logits for part in text.split((1, 20, 1, text.shape[1] - 22), 1)
    ]
    return torch.cat(parts, 1)


def through_torch_save(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_inference_mode(cache):
    with torch.inference_mode():
        return pickle.loads(pickle.dumps(cache))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "oldest pickle": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "torch.save": through_torch_save,
    "pickle in inference mode": in_inference_mode,
    "twice": lambda cache: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(cache)))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_a_copy_is_the_cache(fitted, ids, family, name, how):
    made = fitted(family)
    cache = filled(made, name, ids[:2, :30])
    twin = COPIES[how](cache)
    assert type(twin) is type(cache) and len(twin) == len(cache)
    assert (twin.nbytes, twin.full_nbytes, twin.get_seq_length()) == (cache.nbytes, cache.full_nbytes, 30)
    with torch.enable_grad():  # weights require grad
        assert torch.isfinite(made.model(input_ids=ids[:2, :3], past_key_values=COPIES[how](cache)).logits).all()
    expected = goes_on(made.model, cache, ids[2:4, :30])
    assert torch.equal(goes_on(made.model, twin, ids[2:4, :30]), expected)
    assert twin.nbytes == cache.nbytes and twin.budget == cache.budget
    if family == "gemma3":
        return  # layers with a window take nothing back that they have forgotten
    twin.crop(-20)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (40, 60)


@pytest.mark.parametrize("name", ["ranks", "bits"])
def test_an_empty_copy_and_a_shallow_one(fitted, ids, name):
    made = fitted("llama-gqa")
    empty = nested_cache(made.model, made.adapter, **{"context": 256, **CACHES[name]})
    twin = pickle.loads(pickle.dumps(empty))
    expected = goes_on(made.model, empty, ids[:1, :40])
    assert torch.equal(goes_on(made.model, twin, ids[:1, :40]), expected)
    alias = copy.copy(empty)  # as of transformers' caches: other handle, same layers
    goes_on(made.model, alias, ids[:1, :40])
    assert empty.get_seq_length() == alias.get_seq_length() == 80


def test_a_copy_can_be_shrunk_and_reset(fitted, ids):
    made = fitted("llama-gqa")
    cache = filled(made, "bits", ids[:1, :40])
    twin = through_torch_save(cache)
    for one in (cache, twin):
        one.shrink(0.38)
    assert twin.nbytes == cache.nbytes and torch.equal(
        goes_on(made.model, twin, ids[1:2, :30]), goes_on(made.model, cache, ids[1:2, :30])
    )
    twin.reset()
    assert twin.nbytes == 0 and twin.budget == 0.4


def test_a_file_may_be_read_onto_another_device(fitted, ids):
    """Devices are those of the tensors, and not those of the machine that wrote the file."""
    made = fitted("llama-gqa")
    for name in ("full", "ranks", "bits"):
        cache = filled(made, name, ids[:1, :30])
        for layer in cache.layers:
            layer.device, bases = torch.device("cuda"), layer.bases
            layer.bases = LayerBases(bases.sides, bases.biases, bases.width, torch.device("cuda"))
        twin = through_torch_save(cache)
        assert {part.device.type for layer in twin.layers for part in (layer, layer.bases)} == {"cpu"}
        twin.shrink({"full": 0.8, "ranks": 0.58, "bits": 0.38}[name])
        assert torch.isfinite(goes_on(made.model, twin, ids[1:2, :30])).all()


def test_forgotten_tokens_are_not_in_the_file(fitted, ids):
    """What was cropped is still in memory behind the tokens in use, and none of it is written."""
    made = fitted("llama-gqa")
    for name in ("full", "ranks", "bits"):
        cache = filled(made, name, ids[:1, :60], window=0, sinks=0)
        cache.crop(-30)
        twin = through_torch_save(cache)
        for layer in twin.layers:
            for group in layer.groups:
                for rows in group.rows:
                    for part in [rows] if hasattr(rows, "data") else rows._parts():
                        assert not part.data.narrow(part.dim, 30, part.data.shape[part.dim] - 30).any()
        assert len(pickle.dumps(cache)) < 1.1 * len(pickle.dumps(twin))


# The model that a cache belongs to


def test_a_reloaded_model_goes_on_with_a_cache(fitted, ids, tmp_path):
    """The same weights in another instance, also from a folder, in other precision, or after the first one is gone."""
    made = fitted("llama-gqa")
    made.model.save_pretrained(tmp_path / "model")
    start = filled(made, "ranks", ids[:1, :30])
    expected = goes_on(made.model, copy.deepcopy(start), ids[1:2, :30])
    file = pickle.dumps(start)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert reloaded.config != made.model.config  # the name of the folder, for one
    for model in (tiny_model("llama-gqa"), reloaded):
        kv.attach(model)
        for cache in (pickle.loads(file), copy.deepcopy(start)):
            torch.testing.assert_close(goes_on(model, cache, ids[1:2, :30]), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    kv.attach(half)
    assert torch.isfinite(goes_on(half, pickle.loads(file), ids[1:2, :30])).all()


def test_a_cache_outlives_its_model(ids):
    model = tiny_model("llama-gqa")
    adapter = tiny_fit(model, ids)
    cache = nested_cache(model, adapter, 0.6, sinks=2, window=6, context=256)
    with torch.no_grad():
        model(input_ids=ids[:1, :30], past_key_values=cache)
    del model
    gc.collect()
    again = tiny_model("llama-gqa")
    kv.attach(again)
    assert torch.isfinite(goes_on(again, cache, ids[1:2, :30])).all()
    cache.activate_past_recording()


@pytest.mark.parametrize("change", ["other weights", "one layer trained", "another family", "other rope"])
def test_another_model_is_refused(fitted, ids, change):
    made = fitted("llama-gqa")
    cache = filled(made, "ranks", ids[:1, :30])
    if change == "other weights":
        model = tiny_model("llama-gqa", seed=1)
    elif change == "another family":
        model = tiny_model("qwen2")
    elif change == "other rope":
        model = tiny_model("llama-gqa", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    else:
        model = tiny_model("llama-gqa")
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight += 0.05
    kv.attach(model)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(kv.CacheMismatchError, match="another model"):
            goes_on(model, copied, ids[:1, :30])


def test_a_model_may_be_trained_while_its_caches_live(fitted, ids):
    model = tiny_model("llama-gqa")
    cache = nested_cache(model, fitted("llama-gqa").adapter, 0.6, sinks=2, window=6, context=256)
    with torch.no_grad():
        model(input_ids=ids[:1, :30], past_key_values=cache)
        for parameter in model.parameters():
            parameter *= 1.1
    assert torch.isfinite(goes_on(model, cache, ids[:1, :30])).all()


# Other processes and threads

RESTARTED = """
import sys, torch
from transformers import AutoModelForCausalLM
from nestling import kv
torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
kv.attach(model)
saved = torch.load(folder + "/prompt.pt", weights_only=False)
with torch.no_grad():
    logits = model(input_ids=saved["rest"], past_key_values=saved["cache"]).logits
    saved["cache"].crop(-saved["rest"].shape[1])
    text = model.generate(saved["text"], past_key_values=saved["cache"], max_new_tokens=8, do_sample=False)
torch.save({"logits": logits, "text": text}, folder + "/out.pt")
"""


@pytest.mark.slow
def test_a_prompt_that_was_read_yesterday(fitted, ids, tmp_path):
    """Saved with its cache, and gone on with by a process that loads the model from its folder."""
    made = fitted("llama-gqa")
    made.model.save_pretrained(tmp_path / "model")
    cache = filled(made, "bits", ids[:1, :40])
    rest, text = ids[1:2, :7], torch.cat((ids[:1, :40], ids[1:2, :3]), 1)
    torch.save({"cache": cache, "rest": rest, "text": text}, tmp_path / "prompt.pt")
    with torch.no_grad():
        expected = made.model(input_ids=rest, past_key_values=copy.deepcopy(cache)).logits
        written = made.model.generate(text, past_key_values=cache, max_new_tokens=8, do_sample=False)
    environment = {"PYTHONPATH": str(Path(kv.__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RESTARTED, str(tmp_path)],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    out = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(out["logits"], expected)
    assert torch.equal(out["text"], written)


def _send_back(inbox, outbox):
    torch.set_num_threads(1)
    cache, states = inbox.get()
    cache.layers[0].update(*states)
    cache.crop(-1)
    outbox.put(cache)
    outbox.close()
    outbox.join_thread()
    inbox.get()  # memory is shared as long as the sender lives


@pytest.mark.slow
def test_a_cache_is_sent_to_another_process_and_back(fitted, ids):
    made = fitted("llama-gqa")
    cache = filled(made, "bits", ids[:1, :40])
    context = torch.multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=_send_back, args=(inbox, outbox))
    process.start()
    inbox.put((cache, [torch.randn(1, 2, 1, 16) for _ in range(2)]))
    back = outbox.get(timeout=120)
    inbox.put(None)
    process.join(60)
    assert back.layers[1].length == 39 and cache.layers[1].length == 40
    cache.crop(-1)
    cache.layers[0].crop(0)
    back.layers[0].update(*(s[:, :, -1:] for s in (cache.layers[0].keys, cache.layers[0].values)))
    back.layers[0].crop(-back.layers[0].length + 39)
    assert torch.equal(goes_on(made.model, back, ids[1:2, :30]), goes_on(made.model, cache, ids[1:2, :30]))


def test_threads_with_caches_of_their_own_share_a_model(fitted, ids):
    made, found, errors = fitted("llama-gqa"), {}, []

    def work(name):
        try:
            cache = filled(made, name, ids[:1, :30])
            found[name] = [goes_on(made.model, cache, ids[1:2, :40]) for _ in range(3)]
        except BaseException as error:
            errors.append(error)

    for name in CACHES:
        work(name)
    expected, found = found, {}
    threads = [threading.Thread(target=work, args=(name,)) for name in CACHES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for name in CACHES:
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Reading a cache as transformers' own


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_iteration_gives_keys_and_values_as_stock_caches_do(fitted, ids, family):
    made = fitted(family)
    cache, stock = nested_cache(made.model, made.adapter, 1.0), DynamicCache(config=made.stock.config)
    assert [row[:2] for row in cache] == [row[:2] for row in stock] == [(None, None)] * len(stock)
    with torch.no_grad():
        for model, held in ((made.model, cache), (made.stock, stock)):
            model(input_ids=ids[:2, :30], past_key_values=held)
    assert len(list(cache)) == len(cache) == len(stock)
    for ours, theirs, layer in zip(cache, stock, cache.layers, strict=True):
        assert len(ours) == len(theirs) and (ours[2] is None) == (theirs[2] is None)
        torch.testing.assert_close(ours[:2], theirs[:2])
        assert torch.equal(layer.keys, ours[0]) and torch.equal(layer.values, ours[1])


@pytest.mark.parametrize("name", ["ranks", "bits"])
def test_a_stock_cache_made_from_a_compressed_one_reads_the_same(fitted, ids, name):
    made = fitted("llama-gqa")
    cache = filled(made, name, ids[:2, :50])
    stock = DynamicCache(cache, config=made.model.config)
    assert stock.get_seq_length() == 50 and stock.layers[0].keys.shape == (2, 2, 50, 16)
    new = ids[2:4, :1]
    with torch.no_grad():
        # the window moves on with a token: of 6 to 21 recent ones 12 are exact here, so that nothing leaves
        ours = made.model(input_ids=new, past_key_values=cache).logits
        theirs = made.model(input_ids=new, past_key_values=stock).logits
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.2)


def test_decoded_states_are_read_only_and_stock_caches_have_no_index(fitted, ids):
    made = fitted("llama-gqa")
    cache = filled(made, "ranks", ids[:1, :20])
    with pytest.raises(AttributeError, match="keys"):
        cache.layers[0].keys = torch.zeros(1)
    for one in (cache, DynamicCache(config=made.model.config)):
        with pytest.raises(TypeError, match="not subscriptable"):
            one[0]
