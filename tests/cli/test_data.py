"""Options that name data: kinds of files, columns by name, labels, lines or documents, and what is told of them."""

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from nestling.cli import app
from nestling.cli.data import TextSource, columns_of, sentences_from, texts_from
from nestling.cli.sets import evaluator_of, pairs_from
from nestling.data.pairs import KNOWN
from nestling.errors import DataError, OptionError

from ..embed.families import WORDS, save_backbone, sentence_model, some_texts

PAIRS = [{"question": a, "answer": b} for a, b in zip(some_texts(40, 1), some_texts(40, 2), strict=True)]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def flat(result) -> str:
    return re.sub(r"\s+", " ", result.output)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sentence_model(save_backbone("bert", folder / "backbone")).save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(PAIRS)
    nli = [{"premise": f"w{i} w9", "hypothesis": f"w{i + 1} w7", "label": i % 2} for i in range(20)]
    lines(folder / "nli.jsonl", nli)
    scored = [{"sentence1": row["question"], "sentence2": row["answer"], "gold": i % 5} for i, row in enumerate(PAIRS)]
    lines(folder / "sts.jsonl", scored)
    (folder / "titles.txt").write_text("\n".join(f"{WORDS[i]} {WORDS[i + 9]}" for i in range(60)))
    return folder


def trained(place, out):
    return json.loads((place / out / "nestling.json").read_text())["training"]


def test_train_on_a_table_with_columns_of_other_names(place):
    result = run(
        "embed", "train", place / "model", "--out", place / "named", "--pairs", place / "pairs.csv", "--columns",
        "anchor=question, positive=answer,score=gold", "--sts", place / "sts.jsonl", "--steps", 2, "--batch-size", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert trained(place, "named")["kind"] == "pairs" and trained(place, "named")["rows"] == 40


def test_train_asks_which_label_is_positive(place):
    arguments = ("embed", "train", place / "model", "--out", place / "nli", "--pairs", place / "nli.jsonl", "--steps",
                 2, "--batch-size", 4)  # fmt: skip
    asked = run(*arguments)
    assert asked.exit_code == 1 and "nli.jsonl, line 1" in flat(asked) and "--positive-label" in flat(asked)
    result = run(*arguments, "--positive-label", 1)
    assert result.exit_code == 0, result.output
    assert trained(place, "nli")["rows"] == 10 and trained(place, "nli")["left_out"] == {"pairs labelled 0": 10}
    assert "left out: pairs labelled 0 (10)" in flat(result)


def test_titles_are_texts_of_their_own(place):
    result = run(
        "embed", "train", place / "model", "--out", place / "titles", "--text", place / "titles.txt", "--steps", 2,
        "--batch-size", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert trained(place, "titles")["rows"] == 60 and "each line is taken for a text of its own" in flat(result)
    glued = run(
        "embed", "align", place / "model", "--out", place / "no", "--text", place / "titles.txt", "--documents"
    )
    assert glued.exit_code == 1 and "no sentences" in flat(glued) and "say --lines" in flat(glued)


def test_eval_reads_columns_of_other_names(place):
    result = run(
        "embed", "eval", place / "model", "--sts", place / "sts.jsonl", "--columns", "score=gold", "--json",
        place / "eval.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "sts" in json.loads((place / "eval.json").read_text())["rows"][0]


def test_pretrain_on_a_table(place):
    result = run(
        "embed", "pretrain", place / "model", "--out", place / "pretrained", "--text", place / "pairs.csv",
        "--columns", "text=answer", "--steps", 2, "--batch-size", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--pairs", "pairs.csv", "--columns", "anchor"),
        ("train", "--pairs", "pairs.csv", "--columns", "anchor=question,anchor=answer"),
        ("train", "--pairs", "pairs.csv", "--columns", "text=question"),
        ("train", "--pairs", "pairs.csv", "--columns", "anchor=question,positive=gone"),
        ("train", "--pairs", "pairs.csv"),
        ("train", "--pairs", "nli.jsonl", "--positive-label", "maybe"),
        ("train", "--text", "titles.txt", "--positive-label", "1"),
        ("train", "--pairs", "pairs.csv", "--lines"),
        ("train", "--text", "titles.txt", "--columns", "text=body"),
        ("train", "--text", "titles.txt", "--language", "klingon!"),
        ("train", "--text", "pairs.csv"),
        ("eval", "--sts", "sts.jsonl"),
        ("eval", "--sts", "sts.jsonl", "--columns", "text=gold"),
        ("eval", "--retrieval", "titles.txt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    command, *more = arguments
    result = run("embed", command, "model", *more, *(("--out", "new", "--steps", 1) if command == "train" else ()))
    assert result.exit_code == 1 and "Traceback" not in result.output and "error" in result.output
    assert not (place / "new").exists()


def test_columns_are_those_that_a_reader_knows():
    assert columns_of("anchor=a=b, negative_2 = c", KNOWN) == {"anchor": "a=b", "negative_2": "c"}
    assert columns_of(None, KNOWN) == {}
    for wrong in ("", "=", "anchor=", "=a", "anchor:a", "anchor=a,", "score=a"):
        with pytest.raises(OptionError, match="--columns"):
            columns_of(wrong, KNOWN)


def test_a_source_reads_texts_and_sentences(place):
    titles = TextSource(text=str(place / "titles.txt"), lines=True)
    assert len(list(titles.read())) == 60 and titles.layout == "lines" and titles.named(KNOWN) == {}
    assert list(TextSource(text=str(place / "pairs.csv"), columns="text=answer").read())[0] == PAIRS[0]["answer"]
    with pytest.raises(OptionError, match="anchor is not read here"):
        TextSource(columns="anchor=question").read()


def test_files_of_pairs_with_other_columns_are_refused(place, tmp_path):
    first = lines(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    second = lines(tmp_path / "b.jsonl", [{"anchor": "a", "positive": "b", "negative": "c"}])
    with pytest.raises(DataError, match="b.jsonl: columns anchor, positive, negative, expected anchor, positive"):
        pairs_from([str(first), str(second)], {}, None)


def test_texts_and_sets_by_name(place, tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"body": "one"}, {"body": "two"}])
    assert list(texts_from(str(folder), None, {"text": "body"})) == ["one", "two"]
    assert sentences_from(str(folder), None, {"text": "body"}) == ["one", "two"]
    lines(folder / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)])
    assert list(evaluator_of([str(folder)], None, {}).sts) == ["set"]
