"""The embedding commands, end to end on a tiny random encoder: what they print, write and refuse."""

import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nestling.cli import app
from nestling.cli.embed import _show_training
from nestling.embed import ElasticEncoder
from nestling.embed.ladder import Ladder
from nestling.embed.model.folder import load_projections

from ..embed.families import save_backbone, sentence_model

THINGS = ("lamp", "boat", "bell", "stone", "tower", "letter", "storm", "island", "rope", "window")
PLACES = ("on the hill", "by the sea", "in the town", "under a tree", "near my house", "far from here")
SENTENCES = [f"The {thing} stands {place} today." for thing in THINGS for place in PLACES]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def flat(result) -> str:
    return re.sub(r"\s+", " ", result.output)


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an encoder of one token a character, data of every kind, and a trained encoder."""
    folder = tmp_path_factory.mktemp("cli")
    save_backbone("bert", folder / "backbone")
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {c: i + 2 for i, c in enumerate(string.printable[:90])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    wrapped.save_pretrained(folder / "backbone")
    sentence_model(folder / "backbone").save_pretrained(str(folder / "model"), create_model_card=False)
    (folder / "text.txt").write_text("\n\n".join(SENTENCES))
    write(folder / "pairs.jsonl", [{"anchor": s, "positive": s.upper()} for s in SENTENCES])
    write(folder / "triplets.jsonl", [{"anchor": s, "positive": s, "negative": "No."} for s in SENTENCES])
    write(folder / "bad.jsonl", [{"anchor": "one", "positive": "two"}, {"anchor": "three"}])
    write(folder / "same.jsonl", [{"anchor": "one", "positive": "one"}] * 8)
    both = list(zip(SENTENCES, SENTENCES[7:], strict=False))
    scored = [{"sentence1": a, "sentence2": b, "score": len(set(a) & set(b))} for a, b in both]
    write(folder / "sts.jsonl", scored)
    (folder / "other").mkdir()
    write(folder / "other" / "sts.jsonl", scored)
    (folder / "set" / "qrels").mkdir(parents=True)
    write(folder / "set" / "corpus.jsonl", [{"_id": str(i), "text": s} for i, s in enumerate(SENTENCES)])
    write(folder / "set" / "queries.jsonl", [{"_id": "q", "text": "a bell by the sea"}])
    (folder / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t13\t1\n")
    result = run(
        "embed", "train", folder / "model", "--out", folder / "trained", "--text", folder / "text.txt", "--sizes",
        "1x8,2x16,4x32", "--steps", 20, "--batch-size", 16, "--rank", 4, "--exclude", folder / "same.jsonl", "--sts",
        folder / "sts.jsonl", "--json", folder / "train.json", "--html", folder / "train.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


def test_train_writes_a_model_its_curve_and_a_page(place):
    info = json.loads((place / "trained" / "nestling.json").read_text())
    assert info["training"]["kind"] == "texts" and info["training"]["rows"] == len(SENTENCES)
    assert info["training"]["kept"] in ("best", "start")
    rows = json.loads((place / "train.json").read_text())["rows"]
    assert rows[0]["step"] == 0 and "1x8_mean_sts" in rows[0] and "1x8" in rows[-1]
    assert "<svg" in (place / "train.html").read_text()
    model = SentenceTransformer(str(place / "trained"), device="cpu", local_files_only=True)
    before = SentenceTransformer(str(place / "model"), device="cpu", local_files_only=True)
    np.testing.assert_array_equal(model.encode(SENTENCES[:9]), before.encode(SENTENCES[:9]))
    adapter = ("--adapter", place / "trained" / "adapter", "--sts", place / "sts.jsonl", "--json", place / "a.json")
    for options in ((place / "model", *adapter), (place / "trained", *adapter[2:-1], place / "b.json")):
        result = run("embed", "eval", *options)
        assert result.exit_code == 0, result.output
    one, other = (json.loads((place / name).read_text())["rows"] for name in ("a.json", "b.json"))
    assert [row["sts"] for row in one] == [row["sts"] for row in other]


def test_align_makes_cups_without_training(place):
    more = [f"{sentence[:-1]}, and {other.lower()}" for sentence in SENTENCES[:12] for other in SENTENCES[:30]]
    (place / "more.txt").write_text("\n\n".join(more))
    result = run(
        "embed", "align", place / "model", "--out", place / "aligned", "--text", place / "more.txt", "--sizes",
        "1x8,2x16,4x32", "--json", place / "align.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "align.json").read_text())["rows"]
    cut, aligned = ([r["agreement"] for r in rows if r["method"] == method] for method in ("cut", "aligned"))
    assert aligned[0] > cut[0] and aligned[-1] == cut[-1] == pytest.approx(1)
    assert run("embed", "export", place / "aligned", "--size", "1x8", "--out", place / "first").exit_code == 0
    measured = run("embed", "eval", place / "aligned", "--sts", place / "sts.jsonl", "--json", place / "aligned.json")
    assert measured.exit_code == 0, measured.output
    assert [row["size"] for row in json.loads((place / "aligned.json").read_text())["rows"]] == ["1x8", "2x16", "4x32"]


def test_train_on_pairs_from_several_files_and_a_teacher(place):
    result = run(
        "embed", "train", place / "model", "--out", place / "paired", "--pairs", place / "pairs.jsonl", "--pairs",
        place / "pairs.jsonl", "--steps", 4, "--batch-size", 8, "--teacher", place / "model", "--weight", "4x32=3",
        "--checkpointing",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    training = json.loads((place / "paired" / "nestling.json").read_text())["training"]
    assert training["rows"] == 2 * len(SENTENCES) * 9 // 10 and training["weights"] == {"4x32": 3.0}
    assert "4 steps of 8" in flat(result)


def test_train_on_scored_pairs_resumes_nothing_by_accident(place):
    arguments = ("embed", "train", place / "model", "--out", place / "scored", "--scored", place / "sts.jsonl",
                 "--steps", 4, "--batch-size", 8)  # fmt: skip
    assert run(*arguments).exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 1 and "exists: choose another folder" in flat(again)
    assert run(*arguments, "--resume").exit_code == 0


def test_eval_measures_labelled_sets(place):
    result = run(
        "embed", "eval", place / "trained", "--sts", place / "sts.jsonl", "--retrieval", place / "set", "--grid",
        "--json", place / "eval.json", "--html", place / "eval.html", "--prompt", "query=find: ",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "eval.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [f"{depth}x{width}" for depth in (1, 2, 4) for width in (8, 16, 32)]
    assert {"sts", "ndcg_set", "recall_set", "mean_sts"} <= set(rows[0])
    assert (place / "eval.html").read_text().count("<svg") == 2


def test_eval_without_labels_is_agreement_with_the_full_size(place):
    for model, cups in (("trained", ["1x8", "2x16", "4x32"]), ("model", ["1x4", "2x8", "4x32"])):
        result = run(
            "embed", "eval", place / model, "--text", place / "text.txt", "--json", place / "agree.json", "--html",
            place / "agree.html",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        rows = json.loads((place / "agree.json").read_text())["rows"]
        assert [row["size"] for row in rows][-1] == cups[-1] and (model == "model" or len(rows) == 3)
        assert rows[-1]["agreement"] > 0.999 and rows[-1]["overlap"] > 0.95 > rows[0]["overlap"]


def test_export_all_cups_and_one_with_onnx(place):
    run("embed", "eval", place / "trained", "--sts", place / "sts.jsonl", "--json", place / "rows.json")
    result = run(
        "embed", "export", place / "trained", "--out", place / "cups", "--results", place / "rows.json", "--json",
        place / "export.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (place / "cups").iterdir()) == ["1x8", "2x16", "4x32"]
    small = SentenceTransformer(str(place / "cups" / "2x16"), device="cpu", local_files_only=True)
    assert small.encode(SENTENCES[:3]).shape == (3, 16)
    assert "## Measured" in (place / "cups" / "2x16" / "README.md").read_text()
    rows = json.loads((place / "export.json").read_text())["rows"]
    assert [row["vector_bytes"] for row in rows] == [32, 64, 128] and all(row["difference"] < 1e-5 for row in rows)
    measured = run("embed", "eval", place / "cups" / "2x16", "--sts", place / "sts.jsonl", "--json", place / "m.json")
    assert measured.exit_code == 0, measured.output
    whole = {r["size"]: r["sts"] for r in json.loads((place / "rows.json").read_text())["rows"]}
    (row,) = json.loads((place / "m.json").read_text())["rows"]
    assert row["size"] == "2x16" and row["sts"] == pytest.approx(whole["2x16"], abs=1e-4)


def test_several_cups_are_all_exported_or_none(place):
    arguments = ("embed", "export", place / "trained", "--out", place / "several", "--size", "1x8", "--size")
    failed = run(*arguments, "1x8")
    assert failed.exit_code == 1 and "exists" in flat(failed)
    assert not (place / "several").exists() and not [p for p in place.iterdir() if p.name.startswith(".")]
    assert run(*arguments, "2x16").exit_code == 0
    assert sorted(p.name for p in (place / "several").iterdir()) == ["1x8", "2x16"]
    again = run(*arguments, "4x32")
    assert again.exit_code == 1 and "several exists: choose another folder" in flat(again)


def test_training_goes_on_with_the_projections_of_a_folder(place):
    options = ("--pairs", place / "pairs.jsonl", "--steps", 2, "--batch-size", 8, "--projection-rate", 0)
    start = run("embed", "train", place / "model", "--out", place / "started", "--sizes", "1x8,2x16,4x32", *options)
    assert start.exit_code == 0, start.output
    arguments, old = ("embed", "train", place / "started", *options), load_projections(place / "started")
    assert run(*arguments, "--out", place / "further").exit_code == 0
    assert run(*arguments, "--out", place / "fewer", "--sizes", "2x16,4x32").exit_code == 0
    result = run(*arguments, "--out", place / "centred", "--projection", "centred")
    assert result.exit_code == 0, result.output
    further, fewer, other = (load_projections(place / name) for name in ("further", "fewer", "centred"))
    assert list(further) == [1, 2] and list(fewer) == [2] and other[1].mean is not None
    for depth, projection in further.items():
        torch.testing.assert_close(projection.encode, old[depth].encode, rtol=0, atol=0)
    assert run(*arguments, "--out", place / "none", "--projection", "none").exit_code == 0
    assert not load_projections(place / "none")


def test_prompts_of_a_training_by_column(place):
    result = run(
        "embed", "train", place / "model", "--out", place / "prompted", "--pairs", place / "pairs.jsonl", "--steps", 1,
        "--batch-size", 8, "--prompt", "anchor=find: ", "--prompt", "positive=a=b ",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    training = json.loads((place / "prompted" / "nestling.json").read_text())["training"]
    assert training["prompts"] == {"anchor": "find: ", "positive": "a=b "}


def test_the_closing_table_is_of_the_weights_that_are_kept(capsys):
    curve = [
        {"step": 0, "1x8_mean_sts": 0.11}, {"step": 5, "loss": 3.0, "1x8": 2.0, "kl_1x8": 1.0, "1x8_mean_sts": 0.66},
        {"step": 10, "loss": 1.5, "1x8": 1.0, "kl_1x8": 0.5, "1x8_mean_sts": 0.22},
    ]  # fmt: skip
    info = {"curve": curve, "best_step": 5}
    _show_training("m", Ladder.parse("1x8"), info)
    shown = capsys.readouterr().out
    assert "0.66" in shown and "0.11" in shown and "0.22" not in shown


def test_export_int8(place):
    pytest.importorskip("onnxruntime")
    result = run("embed", "export", place / "trained", "--size", "1x8", "--out", place / "one", "--int8")
    assert result.exit_code == 0, result.output
    assert (place / "one" / "onnx" / "model_int8.onnx").is_file() and "cosine" in result.output


def test_the_demo_on_a_tiny_model(place):
    arguments = ("demo", "embed", "--model", place / "model", "--out", place / "demo.html", "--keep", place / "kept")
    result = run(*arguments, "--json", place / "demo.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "demo.json").read_text())["rows"]
    encoder = ElasticEncoder.from_pretrained(place / "kept")
    assert [row["size"] for row in rows] == [size.name for size in encoder.sizes] and encoder.projections
    for row, size in zip(rows, encoder.sizes, strict=True):
        named = {name: p.numel() for name, p in encoder.model[0].model.named_parameters() if "pooler" not in name}
        deeper = [
            n for name, n in named.items() if (at := re.search(r"layer\.(\d+)\.", name)) and int(at[1]) >= size.layers
        ]
        words = named["embeddings.word_embeddings.weight"]
        count = sum(named.values()) - sum(deeper)
        count += sum(p.numel() for module in list(encoder.cut(size))[1:] for p in module.parameters())
        assert row["parameters"] == pytest.approx(count / 1e6) and row["word_share"] == pytest.approx(words / count)
        assert row["vector"] == 4 * size.dims and row["speed"] > 0 and -1 <= row["cut"] <= 1
    assert rows[-1]["cut"] == pytest.approx(1) and "Word embeddings are" in result.output
    page = (place / "demo.html").read_text()
    assert "Searching the pages" in page and "<svg" in page
    again = run(*arguments)
    assert again.exit_code == 1 and "kept exists" in again.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "model", "--out", "new", "--pairs", "bad.jsonl"), "bad.jsonl, line 2: no field 'positive'"),
        (("train", "model", "--out", "new", "--pairs", "same.jsonl"), "all texts are the same"),
        (("train", "model", "--out", "new", "--pairs", "gone.jsonl"), "gone.jsonl: no such file"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--scored", "sts.jsonl"), "one kind of data"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--pairs", "triplets.jsonl"), "expected anchor"),
        (("train", "model", "--out", "new", "--text", "short.txt"), "short.txt: no sentences"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--sizes", "1x8,9x32"), "deeper than the model"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--sizes", "1x8"), "full size 4x32 is missing"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--sizes", "big"), "'big' is no size"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--weight", "4x32"), "12x768=3"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--weight", "3x32=2"), "3x32 is not in"),
        (("train", "model", "--out", "no/where"), "does not exist"),
        (("align", "model", "--out", "new", "--text", "text.txt"), "60 sentences are too few"),
        (("align", "model", "--out", "new", "--text", "short.txt"), "short.txt: no sentences"),
        (("align", "model", "--out", "trained", "--text", "more.txt"), "trained exists: choose another folder"),
        (("train", "gone", "--out", "new", "--pairs", "pairs.jsonl"), "gone"),
        (("eval", "model", "--sts", "pairs.jsonl"), "pairs.jsonl, line 1: no field 'sentence1'"),
        (("eval", "model", "--sts", "sts.jsonl", "--sts", "other/sts.jsonl"), "another set called sts"),
        (("train", "model", "--out", "new", "--steps", "4", "--epochs", "2"), "steps=4 and epochs=2: both say"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--prompt", "query: "), "a name and a text"),
        (("train", "model", "--out", "new", "--pairs", "pairs.jsonl", "--prompt", "text=a"), "no columns ['text']"),
        (("eval", "model", "--sts", "sts.jsonl", "--text", "text.txt"), "--text is what is measured on where"),
        (("eval", "model", "--sts", "sts.jsonl", "--prompt", "query=a"), "--prompt query: nothing that is measured"),
        (("eval", "model", "--text", "text.txt", "--prompt", "passage=a"), "expected sts"),
        (("export", "model", "--out", "new", "--sizes", "1x8,4x32", "--size", "2x8"), "2x8 is not in the ladder"),
        (("export", "trained", "--out", "new", "--results", "agree.json"), "no results of trained at 1x8, 2x16, 4x32"),
        (("eval", "model", "--retrieval", "nothing"), "nothing: no such folder"),
        (("eval", "model", "--sts", "sts.jsonl", "--prompt", "query"), "expected a name and a text"),
        (("eval", "model", "--sts", "sts.jsonl", "--sizes", "5x8"), "5x8 is deeper than the model"),
        (("eval", "trained", "--sts", "sts.jsonl", "--sizes", "3x8"), "there is no projection for 3x8"),
        (("export", "trained", "--out", "new", "--size", "3x8"), "3x8 is not in the ladder"),
        (("export", "model", "--out", "pairs.jsonl", "--size", "1x8"), "exists"),
        (("export", "model", "--out", "new", "--results", "pairs.jsonl"), "holds no results"),
    ],
)
def test_errors_are_one_clear_line(place, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("short.txt").write_text("too short")
    Path("agree.json").write_text('{"rows": [{"model": "other", "size": "1x8"}]}')
    result = run("embed", *arguments)
    assert result.exit_code == 1
    assert words in flat(result)
    assert "Traceback" not in result.output
    assert not Path("new").exists() and not Path("new-checkpoints").exists()
