"""The benchmarks of pre-training, end to end on tiny models and made-up data."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ..embed.families import WORDS, save_backbone, sentence_model, some_texts
from ..embed.pretraining.test_pretrain import texts

SCRIPTS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, SCRIPTS)
smae, smae_speed = importlib.import_module("smae"), importlib.import_module("smae_speed")
data, rivals = importlib.import_module("embed_data"), importlib.import_module("embed_rivals")
sys.path.pop(0)


def run(module, *arguments):
    import typer

    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, text, and data sets of the layout and names that the benchmarks read, a few rows each."""
    folder = tmp_path_factory.mktemp("benchmarks")
    save_backbone("bert", folder / "backbone")
    sentence_model(folder / "backbone").save_pretrained(str(folder / "model"), create_model_card=False)
    write(folder / "text.jsonl", [{"text": text} for text in texts()])
    one, other, third = (list(dict.fromkeys(some_texts(90, seed, 9)))[:40] for seed in (1, 2, 3))
    pairs = list(zip(one, other, strict=True))
    triplets = [{"anchor": a, "positive": b, "negative": c} for a, b, c in zip(one, other, third, strict=True)]
    write(folder / "nli/nli_triplets.jsonl.gz", triplets)
    write(folder / "pairs/query_passage_train.jsonl.gz", [{"query": a, "passage": b} for a, b in pairs])
    write(folder / "pairs/caption_groups.jsonl.gz", [{"texts": pair} for pair in pairs])
    scored = [{"sentence1": a, "sentence2": b, "score": i} for i, (a, b) in enumerate(pairs)] * 15
    for name in (*data.STS, "stsb_dev_minus_sts16_sick"):
        write(folder / f"sts/{name}.jsonl.gz", scored)
    for name in data.RETRIEVAL:
        place = folder / "retrieval" / name
        write(place / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(one)])
        write(place / "queries.jsonl", [{"_id": "q", "text": WORDS[0]}])
        (place / "qrels").mkdir()
        (place / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    return folder


@pytest.mark.slow
def test_every_arm_is_measured_once(place, monkeypatch):
    for module in (smae, rivals):  # in this process: ten starts of Python take longer than the rest
        monkeypatch.setattr(module, "apart", lambda function, *args: function(*args))

    def study():
        return run(smae, "--data", place, "--work", place / "work", "--text", place / "text.jsonl", "--start",
                   place / "model", "--ladder", "2x16,4x32", "--pretrain-steps", 3, "--pretrain-batch", 8,
                   "--length", 16, "--steps", 3, "--batch", 8, "--out", place / "smae.json",
                   "--arms", "srl,mlm-srl,smae-separate")  # fmt: skip

    result = study()
    assert result.exit_code == 0, result.output
    rows = json.loads((place / "smae.json").read_text())["rows"]
    cups = {method: [r["size"] for r in rows if r["method"] == method] for method in {r["method"] for r in rows}}
    assert set(cups) == {"srl", "mlm-srl", "smae-separate"}
    assert all(sorted(found) == ["2x16", "4x32"] for found in cups.values())
    tokens = {r["method"]: r.get("pretrain_tokens") for r in rows}
    assert tokens["mlm-srl"] == tokens["smae-separate"] > 0 and tokens["srl"] is None
    assert {r["model"] for r in rows} == {"model"} and all(0 <= r["mean_ndcg"] <= 1 for r in rows)
    before = (place / "smae.json").read_text()
    assert study().exit_code == 0 and (place / "smae.json").read_text() == before


@pytest.mark.slow
def test_speed_is_that_of_the_same_losses(place, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    result = run(smae_speed, "--work", place / "work", "--model", place / "model", "--ladder", "1x8,2x16,4x32",
                 "--batch", 4, "--length", 16, "--turns", 2, "--out", place / "speed.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    naive, ours = json.loads((place / "speed.json").read_text())["rows"]
    assert naive["method"] == "naive" and naive["speed_over_naive"] == 1 and ours["tokens_per_s"] > 0
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-5)


def test_a_random_start_is_a_sentence_encoder_of_that_shape(place, tmp_path):
    folders = [smae.random_start(tmp_path / name, 3, 64, str(place / "model"), seed) for name, seed in
               (("a", 0), ("b", 0), ("c", 1))]  # fmt: skip
    states = [sentence.state_dict() for sentence in map(smae.load_encoder, folders)]
    name = "0.model.encoder.layer.2.output.dense.weight"
    assert states[0][name].shape == (64, 256) and torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
