"""Results that are read back: a killed measurement goes on with the numbers that were measured, or not at all."""

import json
import os

import pytest

from nestling.errors import DataError, EvaluationError
from nestling.jobs.results import ResultStore
from nestling.report.results import read_rows, write_json

JOB = {"model": "tiny", "length": 64}


@pytest.fixture
def file(tmp_path):
    kept = ResultStore(tmp_path / "kept.json", JOB)
    kept.done = {"sums": [0.5, 2.0], "sets": {"1x8": {"a": 0.25, "b": float("nan")}}}
    kept.save()
    return tmp_path / "kept.json"


def test_what_was_measured_is_read(file):
    again = ResultStore(file, JOB)
    assert again.numbers("sums", 2) == [0.5, 2.0] and again.columns("sets", ["1x8"])["1x8"]["a"] == 0.25


def test_a_digit_that_was_changed(file):
    file.write_text(file.read_text().replace("0.25", "0.35"))
    with pytest.raises(EvaluationError, match="kept.json is damaged"):
        ResultStore(file, JOB)


@pytest.mark.parametrize(
    "done",
    [
        {"sums": 3},
        {"sums": [0.5]},
        {"sums": [0.5, "2"]},
        {"sums": [True, 2]},
        {"sums": {"a": 1}},
        {"sets": {}},
        {"sets": [1]},
        {"sets": {"1x8": 3}},
        {"sets": {"1x8": {"a": "x"}}},
        {"sets": {"1x8": {"a": None}}},
    ],
)
def test_numbers_that_are_none(file, done):
    """Of a file of an older version, which has no checksum."""
    stored = json.loads(file.read_text())
    del stored["sha256"]
    file.write_text(json.dumps(stored | {"done": stored["done"] | done}))
    kept = ResultStore(file, JOB)
    with pytest.raises(EvaluationError, match="kept.json is damaged"):
        kept.numbers("sums", 2), kept.columns("sets", ["1x8"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"job": []}', '{"job": {}}', '{"job": {}, "done": [1]}', "[" * 5000])
def test_a_file_of_another_form(file, text):
    file.write_text(text)
    with pytest.raises(EvaluationError, match="kept.json"):
        ResultStore(file, JOB)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "kept.json")
    with pytest.raises(EvaluationError, match="kept.json"):
        ResultStore(tmp_path / "kept.json", JOB)


def test_rows_of_results(tmp_path):
    rows = [{"cup": "1x8", "a": 0.5, "b": None}]
    write_json(tmp_path / "r.json", rows, {})
    assert read_rows(tmp_path / "r.json", DataError) == rows
    for text in ("[]", "{}", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"a": []}]}', '{"rows": [{"a": NaN}]}', "{"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(DataError, match="r.json"):
            read_rows(tmp_path / "r.json", DataError)
