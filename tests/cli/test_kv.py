"""The command line, end to end on a tiny random model: what it prints, writes and refuses."""

import json
import re
import string
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nestling import kv
from nestling.cli import app
from nestling.cli.kv import apart
from nestling.kv.cache.buffer import room
from nestling.kv.cache.lengths import bytes_by_length, shared_bytes

from ..kv.families import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog while it rains. " * 80


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model of one token a character, a text and a fitted adapter."""
    folder = tmp_path_factory.mktemp("cli")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(string.printable[:90])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "lm")
    tiny_model("llama-gqa").save_pretrained(folder / "lm")
    (folder / "text.txt").write_text(TEXT)
    result = run(
        "kv", "fit", folder / "lm", "--text", folder / "text.txt", "--out", folder / "adapter",
        "--tokens", 1024, "--length", 128, "--json", folder / "fit.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"Bases: balanced for \d of 6, PCA for \d", result.output)
    return folder


def test_fit_writes_an_adapter_and_results(place):
    assert kv.KVAdapter.from_pretrained(place / "adapter").info["tokens"] == 1024
    row = json.loads((place / "fit.json").read_text())["rows"][0]
    assert list(row["basis"]) == ["key", "value"] and len(row["basis"]["key"]) == 3 and row["seconds"] > 0


def test_the_demo_calibrates_asks_and_measures(place, monkeypatch):
    monkeypatch.setattr("nestling.kv.demo.SIZES", (0.7, 0.6))  # heads of width 16 cannot be cut to an eighth
    monkeypatch.setattr("nestling.kv.demo.MEASURED", (0.75, 0.6))
    result = run(
        "demo", "kv", "--model", place / "lm", "--tokens", 1024, "--context", 1900, "--out", place / "demo.html",
        "--json", place / "demo.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Calibrated on 1,024 tokens" in result.output and "What did the sailors" in result.output
    rows = json.loads((place / "demo.json").read_text())["rows"]
    asked, measured = rows[:3], rows[3:]
    assert [row["size"] for row in asked] == ["full", "70%", "60%"]
    assert asked[0]["mib"] == pytest.approx(1900 * 3 * 2 * 2 * 16 * 2 / 2**20)  # tokens, layers, heads, sides, bf16
    assert asked[0]["share"] == 1 > asked[1]["share"] > asked[2]["share"] > 0.5
    assert all(row["prefill_seconds"] > 0 and row["decode_ms"] > 0 and row["right"] in (0, 1, 2, 3) for row in asked)
    assert [(r["method"], r["budget"]) for r in measured[:3]] == [
        ("full", None),
        ("nestling", 0.75),
        ("nestling", 0.6),
    ]
    assert 0 < measured[1]["kl"] < measured[2]["kl"]
    page = (place / "demo.html").read_text()
    assert "Nothing was trained" in page and "What did the sailors" in page and page.count("<svg") == 3


def test_answers_of_the_demo_come_from_the_cache_and_are_judged(monkeypatch):
    from types import SimpleNamespace

    from nestling.kv import demo, document

    words = ["<eos>", "brass", "bell.", "Olsen", "nobody"]
    script = {"bring": "brass bell.", "woman": "nobody", "cargo": "brass"}
    asked = []

    def read(model, ids, cache):
        if ids.shape[1] > 1:
            asked.append(next(script[word] for word in script if word in tokenizer.text).split())
            cache.append(0)
        said = asked[-1].pop(0) if asked[-1] else "<eos>"
        return torch.eye(len(words))[words.index(said)]

    def tokenizer(text, **options):
        tokenizer.text = text
        return {"input_ids": torch.zeros(1, 9, dtype=torch.long)}

    tokenizer.decode = lambda ids, **options: " ".join(words[i] for i in ids if i)
    monkeypatch.setattr(document, "read", read)
    cache = []
    answers = demo._answers(SimpleNamespace(), tokenizer, cache)
    assert answers == [
        ("They brought her the ship's brass bell", True),
        ("Her name is nobody", False),
        ("The cargo ship was called the brass", False),
    ]
    assert cache == []  # copies were asked
    shown = demo._by_question({"full": answers})
    assert shown[0]["full"].endswith("✓") and shown[1]["full"].endswith("✗")


def test_eval_measures_the_budgets(place):
    result = run(
        "kv", "eval", place / "lm", place / "adapter", "--text", place / "text.txt", "--budgets", "100,75%,0.6",
        "--windows", 2, "--length", 256, "--json", place / "eval.json", "--html", place / "eval.html",
        "--dtype", "float32", "--window", 8, "--no-quantise",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "eval.json").read_text())["rows"]
    assert [r["budget"] for r in rows] == [None, 1.0, 0.75, 0.6]
    assert rows[1]["kl"] < 1e-5 < rows[3]["kl"] and rows[1]["top1"] == 1
    assert rows[2]["bytes_share"] == pytest.approx(0.75 * 2, rel=0.15)  # fp32 storage, shares are of bf16
    page = (place / "eval.html").read_text()
    assert "<svg" in page and "75%" in page


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["eval"], ["serve", "--port", "0"]])
def test_an_adapter_is_needed_where_the_package_has_none(command):
    name, *options = command
    result = run("kv", name, "some-model", *options)
    assert result.exit_code == 1
    assert "some-model: the package has no adapter for it, but for smollm2; make one by" in " ".join(
        result.output.split()
    )


def test_generate_streams_and_reports_bytes(place):
    """A prompt of 400 tokens in the tiny model's bf16 cache: 3 layers, 2 heads, width 16."""
    result = run(
        "kv", "generate", place / "lm", place / "adapter", "--budget", 0.75, "--prompt", TEXT[:400],
        "--max-new-tokens", 8, "--window", 0, "--sinks", 0, "--no-quantise", "--dtype", "bfloat16",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    line = re.sub(r"\s+", " ", result.output)
    found = re.search(r"cache ([\d.]+) MiB held for (\d+) tokens, full cache ([\d.]+) MiB, (\d+) tokens at", line)
    held, tokens, full, new = map(float, found.groups())
    per_token = 3 * 2 * 2 * 16 * 2
    assert full == pytest.approx(tokens * per_token / 2**20, abs=0.006) and 1 <= new <= 8
    assert held == pytest.approx(room(int(tokens)) * per_token * 0.75 / 2**20, abs=0.012)


def test_generate_stays_within_a_limit(place):
    result = run(
        "kv", "generate", place / "lm", place / "adapter", "--budget", 1, "--prompt", TEXT[:400],
        "--max-new-tokens", 8, "--window", 0, "--sinks", 0, "--limit", "0.05MiB",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    line = re.sub(r"\s+", " ", result.output)
    held, full = map(float, re.search(r"cache ([\d.]+) MiB held .* cache ([\d.]+) MiB", line).groups())
    assert 0.02 < held <= 0.05 < full
    assert "--limit='0MiB'" in run(
        "kv", "generate", place / "lm", place / "adapter", "--budget", 1, "--prompt", "The fox", "--limit", "0MiB"
    ).output  # fmt: skip


def test_generate_at_full_budget_prints_what_the_stock_model_says(place):
    from nestling.models import load_model

    model, tokenizer = load_model(str(place / "lm"))
    ids = tokenizer("The quick brown", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    result = run(
        "kv", "generate", place / "lm", place / "adapter", "--budget", 1, "--prompt", "The quick brown",
        "--max-new-tokens", 8, "--dtype", "float32", "--no-quantise",
    )  # fmt: skip
    assert expected.strip() and expected.strip() in result.output


def test_train_shows_the_curve_and_resumes_nothing_by_accident(place):
    arguments = (
        "kv", "train", place / "lm", "--adapter", place / "adapter", "--text", place / "text.txt", "--eval-text",
        place / "text.txt", "--out", place / "trained", "--tokens", 4096, "--length", 128, "--batch-size", 4,
        "--learning-rate", 0.02, "--json", place / "train.json", "--html", place / "train.html",
    )  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 1 and "below the smallest possible" in result.output  # 37.5 % of two steps
    result = run(*arguments, "--budgets", "75,50")
    assert result.exit_code == 0, result.output
    trained = kv.KVAdapter.from_pretrained(place / "trained")
    assert trained.info["training"]["tokens"] == 4096 and "KL to the full model on held-out text" in trained.card
    first, *_, last = (r for r in json.loads((place / "train.json").read_text())["rows"] if "kl_0.5" in r)
    assert (first["tokens"], last["tokens"]) == (0, 4096) and last["kl_0.5"] < first["kl_0.5"]
    assert f"| 4,096 | {last['kl_0.75']:.4f} | {last['kl_0.5']:.4f} |" in trained.card
    assert "<svg" in (place / "train.html").read_text()
    again = run(*arguments, "--budgets", "75,50")
    assert again.exit_code == 1 and "holds checkpoints already" in re.sub(r"\s+", " ", again.output)
    assert run(*arguments, "--budgets", "75,50", "--resume").exit_code == 0


@pytest.mark.parametrize("method", ["blend", "greedy"])
def test_search_writes_an_adapter_for_every_budget(place, method):
    result = run(
        "kv", "search", place / "lm", place / "adapter", "--method", method, "--text", place / "text.txt", "--out",
        place / method, "--windows", 1, "--length", 64, "--window", 8, "--budgets", "75,60", "--json",
        place / "search.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = kv.KVAdapter.from_pretrained(place / method)
    assert f"{found.info['search']['forwards']} forward passes" in result.output
    rows = json.loads((place / "search.json").read_text())["rows"]
    assert [r["budget"] for r in rows] == [0.75, 0.6]
    assert rows[0]["keys"] + rows[0]["values"] == pytest.approx(1.5, abs=0.03)
    shown = run("kv", "inspect", place / method, "--allocation", method, "--budget", "75%")
    assert shown.exit_code == 0, shown.output


def test_inspect_shows_bits_and_bytes(place):
    result = run(
        "kv", "inspect", place / "adapter", "--budget", 0.75, "--json", place / "bits.json", "--png", place / "r.png"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "bits.json").read_text())["rows"]
    adapter = kv.KVAdapter.from_pretrained(place / "adapter")
    bits = [bits for row in rows if "layer" in row for side in ("keys", "values") for bits in row[side]]
    assert 0.7 < sum(bits) / len(bits) / 16 <= 0.77  # recent tokens take less than their share
    lengths = {row["tokens"]: row for row in rows if "tokens" in row}
    assert [*lengths.values()] == bytes_by_length(adapter, 0.75)
    assert lengths[1024]["share"] <= 0.75 + 32 / 1024 and lengths[8192]["share"] <= 0.82
    assert f"{shared_bytes(adapter, 0.75):,} bytes of bases" in result.output
    assert (place / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kv", "inspect", "adapter", "--budget", 0), "--budget='0' is out of range"),
        (("kv", "inspect", "adapter", "--budget", 0.01), "below the smallest possible"),
        (("kv", "inspect", "adapter", "--budget", 0.5, "--allocation", "magic"), "magic"),
        (("kv", "inspect", "nowhere"), "nowhere"),
        (("kv", "inspect", "lm"), "nestling_adapter.json is missing"),
        (("kv", "eval", "lm", "adapter", "--budgets", "half"), "--budgets='half'"),
        (("kv", "eval", "lm", "adapter", "--json", "no/where.json"), "does not exist"),
        (("kv", "eval", "lm", "adapter", "--dtype", "int3"), "int3"),
        (("kv", "generate", "lm", "adapter", "--prompt", "", "--budget", 0.8), "the prompt is empty"),
        (("kv", "fit", "lm", "--out", "new", "--text", "missing.txt"), "missing.txt"),
        (("kv", "fit", "lm", "--out", "new", "--text", "short.txt"), "shorter than one window"),
        (
            ("kv", "train", "lm", "--out", "new", "--text", "text.txt", "--preset", "best"),
            "--preset='best' is unknown",
        ),
        (("kv", "train", "lm", "--out", "new", "--text", "short.txt", "--budgets", 75), "shorter than one window"),
        (("kv", "train", "lm", "--out", "new", "--text", "text.txt", "--budgets", "75,7.5%"), "--budgets='7.5%'"),
        (("kv", "eval", "lm", "adapter", "--budgets", "75,0.5%"), "--budgets='0.5%'"),
        (("kv", "search", "lm", "adapter", "--out", "new", "--budgets", 75, "--method", "luck"), "luck"),
        (("kv", "fit", "nowhere/model", "--out", "new"), "nowhere/model"),
    ],
)
def test_errors_are_one_clear_line(place, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("short.txt").write_text("too short")
    result = run(*arguments)
    assert result.exit_code == 1
    assert words in re.sub(r"\s+", " ", result.output)
    assert "Traceback" not in result.output
    assert not Path("new").exists()


WRITTEN = ("0.75", "75%", "75", " .75 ", "75.0 %")


@pytest.mark.parametrize("written", WRITTEN)
def test_budgets_are_read_alike_in_every_command(place, written):
    adapter, rows = place / "adapter", []
    for words in (
        ("inspect", adapter, "--budget", written),
        ("generate", place / "lm", adapter, "--prompt", "The fox", "--max-new-tokens", 1, "--budget", written),
        ("eval", place / "lm", adapter, "--text", place / "text.txt", "--windows", 1, "--length", 128, "--sinks",
         0, "--window", 0, "--budgets", written, "--json", place / "budget.json"),
    ):  # fmt: skip
        result = run("kv", *words)
        assert result.exit_code == 0, result.output
        rows.append(result.output)
    assert "at 0.75 of the full cache" in rows[0]
    assert json.loads((place / "budget.json").read_text())["rows"][-1]["budget"] == 0.75


@pytest.mark.parametrize(
    "written", ["0", "-1", "101", "1.5%x", "nan", "inf", "half", "", "0%", "200%", "64MB/s", "[/x]"]
)
def test_budgets_that_cannot_be_are_named_as_they_were_given(place, monkeypatch, written):
    monkeypatch.setattr("nestling.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    adapter, model, out = place / "adapter", place / "lm", place / "new"
    for option, words in (
        ("--budget", ("inspect", adapter)),
        ("--budget", ("generate", model, adapter, "--prompt", "x")),
        ("--budgets", ("eval", model, adapter)),
        ("--budgets", ("search", model, adapter, "--out", out)),
        ("--budgets", ("train", model, "--out", out)),
    ):
        result = run("kv", *words, f"{option}={written}")
        assert result.exit_code == 1, result.output
        assert f"{option}={written!r}" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_budget_in_bytes_is_a_limit_where_there_is_a_cache(place):
    result = run(
        "kv", "generate", place / "lm", place / "adapter", "--prompt", TEXT[:400], "--max-new-tokens", 8,
        "--window", 0, "--sinks", 0, "--budget", "50KiB",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert 0 < float(re.search(r"cache ([\d.]+) MiB held", result.output)[1]) <= 50 / 1024 + 0.005
    for other in (("inspect", place / "adapter", "--budget"), ("eval", place / "lm", place / "adapter", "--budgets")):
        refused = run("kv", *other, "50KiB")
        assert refused.exit_code == 1 and "50KiB" in refused.stderr


@pytest.mark.parametrize("count, read", [(0, 0), (1, 1), (2, 1), (100, 30), (100, 95)])
def test_held_out_texts_were_not_read_before(count, read):
    """Nor is the rest of a corpus, of which little is needed."""
    pulled = []

    def corpus():
        for number in range(count):
            pulled.append(number)
            yield str(number)

    learned, held_out = apart(corpus())
    seen = list(islice(learned, read))
    assert len(seen) == read and len(pulled) <= read + read // 19 + 2
    rest = list(held_out)
    if count > 1:
        assert not set(seen) & set(rest) and sorted([*seen, *rest], key=int) == [str(n) for n in range(count)]
    else:
        assert rest == seen
