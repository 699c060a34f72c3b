"""Sentences of evaluation sets are dropped from what is trained on, in whatever form they are written there."""

import gzip
import json
from pathlib import Path

import pytest

from nestling.embed.training.data import Examples
from nestling.embed.training.exclude import LEFT_OUT, without
from nestling.errors import DataError, ExampleError

TEXTS = ["A bird sings.", "The kitten sleeps.", "Rain falls on the roof.", "Nothing is here."]


def kept(excluded, texts=TEXTS):
    return without(Examples.of(texts), excluded)


def test_case_and_punctuation_do_not_count():
    found = kept(["a bird  SINGS", "rain falls; on the roof", "another text"])
    assert found.columns["text"] == ["The kitten sleeps.", "Nothing is here."] and found.left_out == {LEFT_OUT: 2}
    assert kept(None) == Examples.of(TEXTS)
    assert kept(["Other words."]).left_out == {}


def test_files_of_texts_and_of_rows(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a bird sings\n")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps({"sentence1": "Some text", "sentence2": "The kitten sleeps", "score": 3.0}) + "\n")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"_id": "1", "title": "", "text": "It is late. Rain falls on the roof. So what?"}))
    assert kept(str(lines)).columns["text"] == TEXTS[1:]
    assert kept([lines, tmp_path / "rows.jsonl.gz"]).columns["text"] == TEXTS[2:]
    assert kept([corpus]).columns["text"] == [*TEXTS[:2], TEXTS[3]]  # a sentence of a document


def test_what_cannot_be_excluded(tmp_path):
    with pytest.raises(ExampleError, match="1 of 4 texts are left"):
        kept(TEXTS[:3])
    with pytest.raises(DataError, match="missing.jsonl"):
        kept(Path(tmp_path / "missing.jsonl"))
    for excluded in (5, [5]):
        with pytest.raises(DataError, match="5: expected texts"):
            kept(excluded)
