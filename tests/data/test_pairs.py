"""Pairs: every form is read as written, and whatever is wrong with a line is a DataError that names it."""

import gzip
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.data.pairs import read_pairs, read_sts
from nestling.errors import DataError

STS = {"sentence1": "A cat sat.", "sentence2": "A cat is sitting.", "score": 4.5}
PAIR = {"anchor": "a", "positive": "b"}
same_folder = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
said = st.text(min_size=1).filter(lambda text: text.strip() and not any("\ud800" <= c <= "\udfff" for c in text))


def write(path, *rows):
    raw = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_scored_pairs(tmp_path, name):
    path = write(tmp_path / name, {**STS, "subset": "news", "year": 12}, "", {**STS, "score": 0})
    first, second = read_sts(path)
    assert first == {**STS, "subset": "news"}
    assert second == {**STS, "score": 0.0} and isinstance(second["score"], float)


@same_folder
@given(rows=st.lists(st.tuples(said, said, st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_scored_pairs_survive_a_round_trip(tmp_path, rows):
    rows = [dict(zip(STS, row, strict=True)) for row in rows]
    assert read_sts(write(tmp_path / "a.jsonl", *rows)) == rows


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"sentence1": "a", "score": 1}, "no field 'sentence2'; it has 'sentence1', 'score'"),
        ({**STS, "sentence2": None}, "'sentence2' must be text, got None"),
        ({**STS, "sentence1": " \n"}, "'sentence1' is blank"),
        ({**STS, "sentence1": "\ud800"}, "half a surrogate pair"),
        ({"sentence1": "a", "sentence2": "b"}, "no field 'score'"),
        ({**STS, "score": math.nan}, "'score' must be a finite number, got nan"),
        ({**STS, "score": -math.inf}, "'score' must be a finite number, got -inf"),
        ({**STS, "score": "4.5"}, "'score' must be a finite number, got '4.5'"),
        ({**STS, "score": True}, "'score' must be a finite number, got True"),
        ({**STS, "subset": 7}, "'subset' must be text, got 7"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_bad_scored_pairs_are_refused_by_line(tmp_path, row, expected):
    path = write(tmp_path / "a.jsonl", STS, "", row)
    with pytest.raises(DataError) as error:
        read_sts(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and expected in str(error.value)


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([PAIR, {"positive": "d", "anchor": "c", "id": 3}], [PAIR, {"anchor": "c", "positive": "d"}]),
        ([{**PAIR, "negative": "n"}], [{**PAIR, "negative": "n"}]),
        ([{"query": "q", "passage": "p", "source": "x"}], [{"query": "q", "passage": "p"}]),
        (
            [{"id": 1, "texts": ["a", "b", "c"]}],
            [{"anchor": x, "positive": y} for x, y in (("a", "b"), ("a", "c"), ("b", "c"))],
        ),
        (
            [{"text1": "a", "text2": "b", "label": label} for label in (0, 1, True, "1", "0")],
            [PAIR] * 3,
        ),
        (
            [{"premise": "a", "hypothesis": "b", "label": label} for label in ("neutral", "entailment", "x")],
            [PAIR],
        ),
        (
            [{"words": ["car", "auto"], "definition": "four wheels"}],
            [{"anchor": "car, auto", "positive": "four wheels"}],
        ),
    ],
)
def test_every_form_of_pair(tmp_path, rows, expected):
    assert read_pairs(write(tmp_path / "a.jsonl.gz", *rows)) == expected


@same_folder
@given(group=st.lists(said, min_size=2, max_size=6))
def test_a_group_gives_every_pair_once(tmp_path, group):
    pairs = read_pairs(write(tmp_path / "a.jsonl", {"texts": group}))
    n = len(group)
    assert len(pairs) == n * (n - 1) // 2
    assert [p["anchor"] for p in pairs].count(group[0]) >= n - 1
    assert {p["positive"] for p in pairs} == set(group[1:])


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([PAIR, {"anchor": "a"}], "line 2: no field 'positive'; it has 'anchor'"),
        ([{**PAIR, "negative": "n"}, PAIR], "line 2: no field 'negative'"),  # columns must not vary
        ([PAIR, {"query": "q", "passage": "p"}], "line 2: no field 'anchor'"),
        ([{"anchor": "a", "passage": "b"}], "line 1: fields 'anchor', 'passage' are no form of pair; expected anchor"),
        ([{}], "line 1: fields none are no form"),
        ([{**PAIR, "positive": ""}], "line 1: 'positive' is blank"),
        ([{**PAIR, "negative": 3}], "line 1: 'negative' must be text, got 3"),
        ([{"texts": ["a"]}], "line 1: 'texts' must be a list of 2 or more texts, got ['a']"),
        ([{"texts": "ab"}], "line 1: 'texts' must be a list of 2 or more texts, got 'ab'"),
        ([{"texts": ["a", None]}], "line 1: 'texts[1]' must be text, got None"),
        ([{"texts": ["a", "b", "\t"]}], "line 1: 'texts[2]' is blank"),
        ([{"words": [], "definition": "d"}], "line 1: 'words' must be a list of 1 or more"),
        ([{"text1": "a", "text2": "b", "label": None}], "line 1: 'label' must be an integer or a text, got None"),
        ([{"text1": "a", "text2": "", "label": 0}], "line 1: 'text2' is blank"),
        ([{"text1": "a", "text2": "b", "label": 0}], "line 1: no pair up to here is positive, labels are 0"),
        ([], "empty; expected at least one positive pair"),
    ],
)
def test_bad_pairs_are_refused_by_line(tmp_path, rows, expected):
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert str(path) in str(error.value) and expected in str(error.value)


@pytest.mark.parametrize("read", [read_sts, read_pairs])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="unknown kind of file; expected .jsonl"):
        (tmp_path / "a.xls").write_text("x")
        read(tmp_path / "a.xls")
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match="not a file"):
        read(tmp_path / "a.jsonl")
    cut = write(tmp_path / "b.jsonl.gz", *[STS | PAIR] * 200)
    cut.write_bytes(cut.read_bytes()[:-12])
    with pytest.raises(DataError, match="damaged or truncated gzip"):
        read(cut)
