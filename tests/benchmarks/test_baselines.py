"""The baselines of the benchmarks: packing against numpy, bytes as stated; and the scripts from end to end."""

import importlib
import json
import math
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare, held_bytes
from nestling.kv.integration.attach import cached

from ..kv.families import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
baselines, kv_quality, kv_bits = (importlib.import_module(name) for name in ("baselines", "kv_quality", "kv_bits"))
sys.path.pop(0)

STATES = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16, 24, 32, 64, 80])),
    elements=st.floats(-300, 300, width=32),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=60)
@given(STATES)
def test_int8_equals_numpy(x):
    codes, scale = baselines.quantise8(torch.from_numpy(x))
    reference = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    divisor = np.where(reference == 0, 1, reference).astype(np.float32)
    expected = np.clip(np.rint(x / divisor), -127, 127)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    np.testing.assert_array_equal(scale.numpy(), reference)
    np.testing.assert_array_equal(codes.numpy(), expected)
    back = baselines.dequantise8(codes, scale).numpy()
    np.testing.assert_array_equal(back, expected.astype(np.float32) * reference.astype(np.float32))
    # half a step, the rounding of the scale to fp16, and what is below its smallest step
    assert (np.abs(back - x) <= divisor * 0.5 + np.abs(x).max(-1, keepdims=True) * 2**-10 + 127 * 2**-24).all()


@settings(deadline=None, max_examples=60)
@given(STATES, st.sampled_from([2, 3, 4]))
def test_groups_equal_numpy(x, bits):
    width, most = x.shape[-1], 2**bits - 1
    group = math.gcd(32, width)
    packed, scale, minimum = baselines.quantise_groups(torch.from_numpy(x), bits)
    groups = x.reshape(*x.shape[:-1], -1, group)
    low = groups.min(-1, keepdims=True).astype(np.float16)
    step = np.maximum(groups.max(-1, keepdims=True) - low.astype(np.float32), 0) / np.float32(most)
    step = step.astype(np.float16)
    divisor = np.where(step == 0, 1, step).astype(np.float32)
    codes = np.clip(np.rint((groups - low.astype(np.float32)) / divisor), 0, most).astype(np.uint8)
    assert packed.dtype == torch.uint8 and packed.shape == (*x.shape[:-1], bits * width // 8)
    assert scale.shape == minimum.shape == (*x.shape[:-1], width // group)
    back = baselines.dequantise_groups(packed, scale, minimum, bits).numpy()
    expected = codes.astype(np.float32) * step.astype(np.float32) + low.astype(np.float32)
    np.testing.assert_array_equal(back, expected.reshape(x.shape))
    largest = np.abs(groups).max(-1, keepdims=True)
    error = np.abs(expected - groups)
    assert (error <= divisor * 0.5 + 3 * largest * 2**-10 + 16 * 2**-24).all()


@settings(deadline=None, max_examples=30)
@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([32, 64])), elements=st.integers(0, 15)))
def test_int4_packing_is_lossless(codes):
    codes[:, ::32], codes[:, 1::32] = 0, 15  # every group uses its whole range, so the step is 1
    packed = baselines.quantise_groups(torch.from_numpy(codes.astype(np.float32)), 4)
    assert (baselines.dequantise_groups(*packed, 4).numpy() == codes).all()


def test_hadamard_matrices_spread_an_outlier_evenly():
    matrix = baselines.hadamard(16, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(16))
    assert matrix.abs().unique().tolist() == [0.25]
    with pytest.raises(ValueError, match="power of two"):
        baselines.hadamard(24, torch.device("cpu"))


def test_keys_by_channel_survive_an_outlier_channel():
    """KIVI's reason: one large channel does not spoil the others. All tokens but the last few are quantised."""
    states = torch.randn(2, 3, 70, 64, generator=torch.Generator().manual_seed(0))
    states[..., 5] *= 100
    config = tiny_model("llama-gqa").config
    (layer, *_), (plain, *_) = baselines.kivi_cache(config, 2).layers, baselines.int_cache(config, 2).layers
    for part in states.split(9, 2):
        keys, values = layer.update(part, part)
        by_token, _ = plain.update(part, part)
    others = torch.arange(64) != 5
    error, by_token = ((k - states)[:, :, :64, others].square().mean() for k in (keys, by_token))
    assert error < 0.5 * by_token
    torch.testing.assert_close(keys[:, :, 64:], states[:, :, 64:].bfloat16().float())
    codes = 2 * 3 * 64 * (64 * 2 // 8 + 2 * 2 * 64 // 32)  # two groups of 32 tokens, scale and minimum for each
    recent = 2 * 3 * 6 * 64 * 2
    of_values = 2 * 3 * 70 * (64 * 2 // 8 + 2 * 2 * 64 // 32)
    assert held_bytes(baselines.Cache(layers=[layer])) == codes + recent + of_values


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_by_channel_come_in_any_parts(bits):
    """Widths of two fields too: what is appended must not move what is there."""
    states = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(1))
    config, found = tiny_model("llama-gqa").config, []
    for size in (100, 7):
        layer = baselines.kivi_cache(config, bits).layers[0]
        for part in states.split(size, 2):
            keys, values = layer.update(part, part)
        found.append((keys, values))
    torch.testing.assert_close(*found)
    spread = states[:, :, :96].unflatten(2, (-1, 32))
    step = (spread.amax(3) - spread.amin(3)) / ((1 << bits) - 1)
    error = (found[0][0] - states)[:, :, :96].unflatten(2, (-1, 32)).abs().amax(3)
    assert (error <= 0.51 * step + 0.02).all()  # keys wait in bf16


def test_keys_by_channel_can_be_repeated_and_selected():
    """What waits for a whole group as well: a batch of two that was made of one gives what one does."""
    states = torch.randn(1, 2, 80, 16, generator=torch.Generator().manual_seed(1))
    config = tiny_model("llama-gqa").config
    one, two = (baselines.kivi_cache(config, 4).layers[0] for _ in range(2))
    for layer in (one, two):
        layer.update(states[:, :, :70], states[:, :, :70])
    two.batch_repeat_interleave(3)
    two.batch_select_indices(torch.tensor([0, 2]))
    expected = one.update(states[:, :, 70:], states[:, :, 70:])
    found = two.update(*[states[:, :, 70:].repeat(2, 1, 1, 1)] * 2)
    for part, whole in zip(expected, found, strict=True):
        torch.testing.assert_close(whole, part.repeat(2, 1, 1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("bits, per_head", [(8, 16 + 2), (4, 8 + 4), (3, 6 + 4), (2, 4 + 4)])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_bytes_and_shapes(family, bits, per_head, ids):
    model = tiny_model(family, head_dim=16)
    cache = baselines.int_cache(model.config, bits)
    with torch.no_grad():
        for part in ids.split(10, 1):
            model(input_ids=part, **cached(model, cache))
    ours = [layer for layer in cache.layers if isinstance(layer, baselines.IntLayer)]
    assert len(ours) == (3 if family == "llama-gqa" else 1)
    assert cache.get_seq_length() == 40
    for layer in ours:
        assert held_bytes(baselines.Cache(layers=[layer])) == 4 * 40 * 2 * 2 * per_head  # batch, tokens, heads, sides
        keys, values = layer.update(torch.randn(4, 2, 1, 16), torch.randn(4, 2, 1, 16))
        assert keys.shape == values.shape == (4, 2, 41, 16) and keys.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_is_quantised_twice(bits, ids):
    layer, states = baselines.IntLayer(bits), torch.randn(2, 3, 30, 64)
    for part in states.split(7, 2):
        keys, values = layer.update(part, -part)
    whole = baselines.IntLayer(bits).update(states, -states)
    assert torch.equal(keys, whole[0]) and torch.equal(values, whole[1])
    assert (keys - states).abs().max() < {8: 0.03, 4: 0.3}[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_int_cache_verbs(bits):
    layer, states = baselines.IntLayer(bits), torch.randn(2, 3, 9, 32)
    one = torch.randn(4, 3, 1, 32)
    kept, _ = layer.update(states, states)
    layer.crop(-4)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 1, 3, 2]))
    layer.reorder_cache(torch.tensor([3, 2, 1, 0]))
    keys, _ = layer.update(one, one)
    assert layer.get_seq_length() == 6 and layer.get_mask_sizes(2) == (8, 0)
    assert torch.equal(keys[:, :, :5], kept[[1, 1, 0, 0], :, :5])
    layer.reset()
    assert layer.get_seq_length() == 0 and held_bytes(baselines.Cache(layers=[layer])) == 0
    with pytest.raises(ValueError, match="bits"):
        baselines.IntLayer(5)


def test_more_bits_are_closer(ids):
    model = tiny_model("llama-gqa")
    entrants = [Candidate(f"int{b}", None, lambda b=b: baselines.int_cache(model.config, b)) for b in (8, 4)]
    config = EvalConfig(windows=4, length=40, chunk=10)
    rows = compare(model, None, ids, entrants, config, progress=False)
    assert 0 < rows[1]["kl"] < 0.01 < rows[2]["kl"]
    assert [row["bytes_share"] for row in rows[1:]] == [18 / 32, 12 / 32]
    generated = [
        model.generate(ids[:1], **cached(model, cache), max_new_tokens=8, do_sample=False)
        for cache in (None, baselines.int_cache(model.config, 8))
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("make", ["quanto_cache", "hqq_cache"])
def test_transformers_caches_hold_bf16(make, ids):
    pytest.importorskip({"quanto_cache": "optimum.quanto", "hqq_cache": "hqq"}[make])
    model, held = tiny_model("llama-gqa", hidden_size=256), []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            cache = getattr(baselines, make)(model.config, residual_length=16)
            for part in ids[:1, :36].split(12, 1):  # 12 quantised, 12 exact, then all quantised
                out = model.to(dtype)(input_ids=part, **cached(model, cache))
            assert out.logits.dtype == dtype
            held.append(held_bytes(cache))
    elements = 36 * 3 * 2 * 2 * 64
    assert held == [elements // 2 + 2 * elements // 64 * 2] * 2, "half a byte, and scale and zero in bf16 per 64"
    with pytest.raises(ValueError, match="full attention only"):
        getattr(baselines, make)(tiny_model("gemma3").config)


def test_articles_and_rows():
    wiki = ["= A =", "text", "== Part ==", "more", "= B =", "end"]
    assert list(kv_quality.articles(wiki)) == ["= A =\n\ntext\n\n== Part ==\n\nmore", "= B =\n\nend"]
    key = {"model": "m", "method": "int4", "budget": None}
    old = [{**key, "kl": 1.0, "bytes_share": 0.3}]
    new = [{**key, "kl": None, "acc_x": 0.5}, {**key, "method": "full"}]
    assert kv_quality.merged(old, new) == [{**key, "method": "full"}, {**old[0], "acc_x": 0.5}]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Options of the scripts for a tiny model of letters, and texts."""
    vocabulary = {"<pad>": 0, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(string.printable[:90])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(tmp_path / "toy")
    tiny_model("llama-gqa").save_pretrained(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    for script in (kv_quality, kv_bits):
        monkeypatch.setattr(script, "texts", lambda data: (["a text to learn. "] * 60, ["and one to read. "] * 40))
    monkeypatch.setattr("nestling.kv.adapter_files.version", lambda name: "0", raising=False)  # a checkout has none
    base = ["--model", str(tmp_path / "toy"), "--tokens", "256", "--length", "128", "--windows", "2"]
    return [*base, "--adapters", str(tmp_path / "fitted")]


def test_bits_of_both_kinds_beside_ranks_and_integers(toy, tmp_path):
    """The second run asks for numbers, and leaves what the first has measured as it was."""
    app, out = kv_bits.typer.Typer(), tmp_path / "bits.json"
    app.command()(kv_bits.main)
    base = [*toy, "--data", str(tmp_path), "--budgets", "0.9,0.8", "--window", "8", "--out", str(out)]
    base += ["--methods", "bits,bits-balanced,ranks,int4", "--adapter", str(tmp_path / "fitted/balanced-window-256")]
    made = CliRunner().invoke(app, [*base, "--only", "kl", "--methods", "bits-balanced"], catch_exceptions=False)
    result = CliRunner().invoke(app, [*base, "--only", "kl"], catch_exceptions=False)
    assert made.exit_code == result.exit_code == 0
    rows = {(row["method"], row["budget"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 8 and rows["bits", 0.8]["kl"] == rows["bits-balanced", 0.8]["kl"] < rows["ranks", 0.8]["kl"]
    numbers = ["--only", "tasks", "--rows", "0", "--passkey", "200"]
    assert CliRunner().invoke(app, [*base, *numbers], catch_exceptions=False).exit_code == 0
    after = {(row["method"], row["budget"]): row for row in json.loads(out.read_text())["rows"]}
    assert all(after[key] == row | {"passkey_200": 0} for key, row in rows.items())
    other = ["--name", "other", "--methods", "bits,ranks", "--budgets", "0.4", "--only", "kl"]
    assert CliRunner().invoke(app, [*base, *other], catch_exceptions=False).exit_code == 0
    names = [row["method"] for row in json.loads(out.read_text())["rows"]]
    assert names == ["full", "bits", "bits", "bits-other", *["bits-balanced"] * 2, "ranks", "ranks", "int4"]


def test_the_script(toy, tmp_path, monkeypatch):
    """KL, then tasks, in one file; the second run is killed and goes on."""
    app, out = kv_quality.typer.Typer(), tmp_path / "new" / "quality.json"
    app.command()(kv_quality.main)
    base = [*toy, "--budgets", "1,0.9", "--out", str(out), "--methods", "pca-uniform,balanced-window,int4"]
    base += ["--passkey", "200", "--task-budgets", "0.9"]

    result = CliRunner().invoke(app, [*base, "--only", "kl"], catch_exceptions=False)
    assert result.exit_code == 0 and "pca-uniform" in result.output
    results = json.loads(out.read_text())
    names = [(r["method"], r["budget"]) for r in results["rows"]]
    nested = [(method, size) for method in ("pca-uniform", "balanced-window") for size in (1.0, 0.9)]
    assert names == [("full", None), *nested, ("int4", None)]
    assert results["rows"][0]["bytes_share"] == 1 and results["rows"][-1]["bytes_share"] == pytest.approx(12 / 32)
    assert not (tmp_path / "new" / "quality.partial.json").exists()
    assert str(tmp_path) not in out.read_text()

    save = ResultStore.save

    def dying(self):
        save(self)
        if len(self.done) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultStore, "save", dying)
    CliRunner().invoke(app, [*base, "--only", "tasks"])
    assert len(json.loads((tmp_path / "new" / "quality.partial.json").read_text())["done"]) == 4
    monkeypatch.setattr(ResultStore, "save", save)
    result = CliRunner().invoke(app, [*base, "--only", "tasks"], catch_exceptions=False)
    assert result.exit_code == 0
    both = json.loads(out.read_text())
    assert [(r["method"], r["budget"]) for r in both["rows"]] == names
    for old, row in zip(results["rows"], both["rows"], strict=True):
        assert row | old == row and ("passkey_200" in row) == (row["budget"] != 1)
    assert [r["part"] for r in both["meta"]["runs"]] == ["kl", "tasks"]
    result = CliRunner().invoke(app, [*base, "--length", "32"])
    assert result.exit_code != 0 and "other settings" in result.output
