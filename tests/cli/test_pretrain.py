"""``nestling embed pretrain``, end to end on a tiny random encoder: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nestling.cli import app

from ..embed.families import save_backbone, sentence_model
from ..embed.pretraining.test_pretrain import CUPS, texts


def run(*arguments: object):
    return CliRunner().invoke(app, ["embed", *(str(a) for a in arguments)])


def flat(result) -> str:
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an encoder, text, and a pre-trained model."""
    folder = tmp_path_factory.mktemp("cli")
    save_backbone("bert", folder / "backbone")
    sentence_model(folder / "backbone").save_pretrained(str(folder / "model"), create_model_card=False)
    lines = [json.dumps({"text": text}) for text in texts()]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "bad.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    result = run("pretrain", folder / "model", "--out", folder / "start", *common(folder), "--json", folder / "a.json",
                 "--html", folder / "a.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(flat(result))
    return folder


def common(folder: Path, text: str = "text.jsonl", steps: int = 6) -> list[object]:
    return ["--text", folder / text, "--sizes", CUPS, "--steps", steps, "--batch-size", 8, "--length", 16]


def test_it_prints_and_writes_the_losses_of_every_cup(place):
    rows = json.loads((place / "a.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and {"dec_4x32", "loss"} < set(rows[0])
    assert {"mlm_1x8", "mlm_2x16"} < {name for row in rows for name in row} and len(rows[0]) == 7
    printed = (place / "printed.txt").read_text()
    assert all(
        word in printed for word in ("encoder, first", "decoder, last", "2x16", "6 steps", "new masked-language head")
    )
    page = (place / "a.html").read_text()
    assert "<svg" in page and "Nats per masked token" in page and "KL" not in page
    info = json.loads((place / "start" / "nestling.json").read_text())
    assert info["pretraining"]["steps"] == 6 and len(info["cups"]) == 3


def test_train_starts_from_its_result_at_its_cups(place):
    rows = [json.dumps({"anchor": text, "positive": text[::-1]}) for text in texts(16)]
    (place / "pairs.jsonl").write_text("\n".join(rows))
    result = run("train", place / "start", "--out", place / "trained", "--pairs", place / "pairs.jsonl", "--steps", 2)
    assert result.exit_code == 0, result.output
    info = json.loads((place / "trained" / "nestling.json").read_text())
    assert [cup["layers"] for cup in info["cups"]] == [1, 2, 4] and "training" in info


def test_it_resumes(place):
    arguments = ["pretrain", place / "model", "--out", place / "again", *common(place), "--save-steps", 2]
    assert run(*arguments).exit_code == 0
    (place / "again").rename(place / "whole")
    result = run(*arguments)
    assert result.exit_code == 1 and "holds checkpoints already" in flat(result)
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    whole, again = ((place / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert whole == again


def test_a_folder_of_transformers_own_needs_a_pooling(place):
    arguments = ["pretrain", place / "backbone", "--out", place / "own", *common(place, steps=1)]
    result = run(*arguments)
    assert result.exit_code == 1 and "has no modules.json" in flat(result)
    result = run(*arguments, "--pooling", "cls", "--no-decoder", "--sizes", "4x32")
    assert result.exit_code == 0 and "decoder, first" not in flat(result), result.output
    assert json.loads((place / "own" / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "cls"


def test_bad_lines_stop_it_or_are_counted(place):
    arguments = ["pretrain", place / "model", "--out", place / "lines", *common(place, "bad.jsonl", 1)]
    result = run(*arguments)
    assert result.exit_code == 1 and "bad.jsonl, line 4: not valid JSON" in flat(result)
    result = run(*arguments, "--skip-bad")
    assert result.exit_code == 0 and "Bad lines left out: 1" in flat(result), result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--decoder-ratio", 0.1], "expected 0 < encoder_ratio <= decoder_ratio < 1"),
        (["--sizes-per-step", -1], "--sizes-per-step=-1 is out of range"),
        (["--text", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--json", "nowhere/a.json"], "does not exist: make it first"),
    ],
)
def test_bad_options_are_one_line(place, arguments, message):
    result = run("pretrain", place / "model", "--out", place / "none", *common(place), *arguments)
    assert result.exit_code == 1 and message in flat(result) and "Traceback" not in result.output
    assert not (place / "none").exists()
