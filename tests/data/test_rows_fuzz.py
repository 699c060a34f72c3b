"""Whatever rows hold, readers give what they promise, or a DataError that names the place."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.data.pairs import KNOWN, read_pairs, read_sts
from nestling.data.retrieval import read_retrieval
from nestling.data.texts import read_multiple_choice, read_texts
from nestling.embed.training.data import Examples
from nestling.errors import DataError, ExampleError, NestlingError

same_folder = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
odd = [np.float32(1.5), np.int64(1), np.str_("a"), np.array(["a", "b"]), np.array(2), 10**400, "entailment"]
leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=9), st.binary(max_size=3),
    st.sampled_from(odd),
)  # fmt: skip
value = st.one_of(leaf, st.lists(leaf, max_size=3), st.dictionaries(st.text(max_size=3), leaf, max_size=2))
names = [*KNOWN, "sentence1", "sentence2", "score", "subset", "text", "id", "label_text", "neg"]
column = st.one_of(st.sampled_from(names), st.text(max_size=9), st.integers(0, 2))
row = st.one_of(
    st.dictionaries(column, value, max_size=6), leaf, st.lists(leaf, max_size=4), st.tuples(st.text(), st.text(), leaf)
)


@same_folder
@given(rows=st.lists(row, max_size=4))
def test_rows_of_anything(rows):
    for read, expected in ((read_pairs, dict), (read_sts, dict), (read_texts, str), (read_multiple_choice, dict)):
        try:
            found = list(read(rows))
        except DataError as error:
            assert re.search(r"row \d|empty|expected", str(error)), str(error)
        else:
            assert found and all(type(item) is expected for item in found)
    for own_loss in (True, False):
        try:
            made = Examples.of(rows, own_loss)
        except ExampleError:
            continue
        assert {type(text) for text in made.texts()} == {str} and len({len(c) for c in made.columns.values()}) == 1


@same_folder
@given(columns=st.dictionaries(column, value | st.lists(st.text(min_size=1), min_size=2, max_size=2), max_size=4))
def test_columns_of_anything(columns):
    for read in (read_pairs, read_sts, lambda data: list(read_texts(data)), Examples.of):
        try:
            assert read(columns)
        except NestlingError:
            pass


@same_folder
@given(
    content=st.binary() | st.text(alphabet='ab",\t\n;\r\0é', max_size=60).map(str.encode),
    name=st.sampled_from(["csv", "tsv", "parquet"]),
)
@pytest.mark.parametrize("header", [b"", b"anchor,positive\n", b"anchor\tpositive\n"])
def test_bytes_of_anything(tmp_path, content, name, header):
    path = tmp_path / f"a.{name}"
    path.write_bytes(header + content)
    for read in (read_pairs, read_sts, lambda source: list(read_texts(source))):
        try:
            assert read(path)
        except DataError as error:
            assert str(path) in str(error)


@same_folder
@given(content=st.text(alphabet='qd12 \t\n"-.x', max_size=60) | st.text(max_size=30))
def test_judgements_of_anything(tmp_path, content):
    (tmp_path / "qrels").mkdir(exist_ok=True)
    for stem in ("corpus", "queries"):
        rows = [{"_id": key, "text": str(key)} for key in ("q", "d", "q1", "d2", "1", 2)]
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels" / "test.tsv").write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        found = read_retrieval(tmp_path)
    except DataError as error:
        assert "test.tsv" in str(error)
    else:
        gains = [gain for row in found.relevant.values() for gain in row.values()]
        assert gains and all(gain > 0 and math.isfinite(gain) for gain in gains)


def test_columns_without_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([["a", "b", "c"], ["d", "e", "f"]])
    with pytest.raises(DataError, match="row 1: fields 0, 1, 2 are no form of pair"):
        read_pairs(frame)
    found = read_pairs(frame, columns={"anchor": 0, "positive": 2})
    assert found == [{"anchor": "a", "positive": "c"}, {"anchor": "d", "positive": "f"}]


def test_a_number_in_a_tuple_is_not_guessed_at():
    for number in (0, 1, np.int64(2), True, 1.0):
        with pytest.raises(ExampleError, match="read_sts"):
            Examples.of([("a", "b", number), ("c", "d", 0)])
    assert Examples.of([("a", "b", 0.5), ("c", "d", 1)]).kind == "scored"
    assert Examples.of(read_sts([("a", "b", 0), ("c", "d", 1)])).labels == [0.0, 1.0]


def test_pairs_without_any_label():
    rows = [{"premise": "a", "hypothesis": "b", "label": -1}] * 2
    for read in (read_pairs, Examples.of):
        with pytest.raises(NestlingError, match="row 2: no pair up to here has a label"):
            read(rows)
