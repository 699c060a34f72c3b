"""Retrieval sets: the layout of BEIR as published, and errors that name the file and the line."""

import gzip
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.errors import DataError
from nestling.retrieval import read_retrieval

CORPUS = [{"_id": "d1", "title": "Ice", "text": "Water freezes."}, {"_id": "d2", "text": "Steam"}]
QUERIES = [{"_id": "q1", "text": "cold?"}, {"_id": "q2", "text": "hot?"}, {"_id": "q3", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\n"


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def layout(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, zipped=False):
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "qrels").mkdir(parents=True)
    for stem, rows in (("corpus", corpus), ("queries", queries)):
        text = rows if isinstance(rows, str) else lines(rows)
        if zipped:
            (folder / f"{stem}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{stem}.jsonl").write_text(text)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("header", [True, False])
def test_a_set(tmp_path, zipped, header):
    qrels = QRELS if header else QRELS.split("\n", 1)[1]
    found = read_retrieval(layout(tmp_path / "ice", qrels=qrels.replace("\n", "\r\n"), zipped=zipped))
    assert found.name == "ice"
    assert found.corpus == {"d1": "Ice Water freezes.", "d2": "Steam"}
    assert found.queries == {"q1": "cold?", "q2": "hot?"}  # q3 has no judgement
    assert found.relevant == {"q1": {"d1": 2.0}, "q2": {"d2": 1.0}}  # a zero is not relevant


def test_other_splits_and_blank_documents(tmp_path):
    folder = layout(tmp_path / "a", corpus=[*CORPUS, {"_id": "d3", "title": "", "text": ""}])
    (folder / "qrels" / "dev.tsv").write_text("q3\td3\t1\n")
    found = read_retrieval(folder, "dev")
    assert found.relevant == {"q3": {"d3": 1.0}} and found.corpus["d3"] == ""


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gains=st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(-1, 3), min_size=1))
def test_relevance_is_what_the_file_says(tmp_path, gains):
    rows = [{"_id": str(i), "text": f"text {i}"} for i in range(5)]
    folder = layout(tmp_path / "a", rows, rows, "".join(f"{q}\t{d}\t{gain}\n" for (q, d), gain in gains.items()))
    if all(gain <= 0 for gain in gains.values()):
        with pytest.raises(DataError, match="no query has a relevant document"):
            read_retrieval(folder)
        return
    found = read_retrieval(folder)
    assert {(int(q), int(d)): g for q, row in found.relevant.items() for d, g in row.items()} == {
        key: gain for key, gain in gains.items() if gain > 0
    }
    assert list(found.queries) == list(found.relevant)


@pytest.mark.parametrize(
    "changes, where, expected",
    [
        ({"corpus": CORPUS + CORPUS[:1]}, "corpus.jsonl, line 3", "'_id' 'd1' appears twice"),
        ({"corpus": [{"id": "d1", "text": "x"}]}, "corpus.jsonl, line 1", "no field '_id'; it has 'id', 'text'"),
        ({"corpus": [{"_id": 1, "text": "x"}]}, "corpus.jsonl, line 1", "'_id' must be text, got 1"),
        ({"corpus": [{"_id": "1", "text": None}]}, "corpus.jsonl, line 1", "'text' must be text"),
        ({"corpus": [{"_id": "1", "text": "x", "title": 3}]}, "corpus.jsonl, line 1", "'title' must be text"),
        ({"corpus": lines(CORPUS) + "{"}, "corpus.jsonl, line 3", "not valid JSON"),
        ({"corpus": ""}, "corpus.jsonl", "empty"),
        ({"queries": [{"_id": "q1", "text": " "}]}, "queries.jsonl, line 1", "'text' is blank"),
        ({"qrels": ""}, "test.tsv", "empty"),
        ({"qrels": "h\th\th\n"}, "test.tsv", "no query has a relevant document"),
        ({"qrels": QRELS + "q1 d1 1\n"}, "test.tsv, line 5", "expected 3 columns separated by tabs"),
        ({"qrels": QRELS + "q9\td1\t1\n"}, "test.tsv, line 5", "query 'q9' is not in the queries"),
        ({"qrels": QRELS + "q1\td9\t1\n"}, "test.tsv, line 5", "document 'd9' is not in the corpus"),
        ({"qrels": QRELS + "q1\td1\t1\n"}, "test.tsv, line 5", "judged twice"),
        ({"qrels": QRELS + "q2\td1\tnan\n"}, "test.tsv, line 5", "the gain must be a finite number, got 'nan'"),
        ({"qrels": "q2\td1\thigh\n"}, "test.tsv, line 1", "the gain must be a finite number, got 'high'"),
    ],
)
def test_bad_sets_are_refused_by_line(tmp_path, changes, where, expected):
    with pytest.raises(DataError) as error:
        read_retrieval(layout(tmp_path / "a", **changes))
    assert where in str(error.value) and expected in str(error.value)


def test_missing_parts(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_retrieval(tmp_path / "none")
    folder = layout(tmp_path / "a")
    with pytest.raises(DataError, match="train.tsv: no such file; splits that are there: test"):
        read_retrieval(folder, "train")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"no queries.jsonl or queries.jsonl.gz; expected a folder in the layout"):
        read_retrieval(folder)
    with pytest.raises(DataError, match="not a folder"):
        read_retrieval(folder / "corpus.jsonl")
