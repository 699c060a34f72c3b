"""Retrieval sets: the layout of BEIR as published, and errors that name the file and the line."""

import gzip
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.data.retrieval import Retrieval, read_retrieval
from nestling.errors import DataError, OptionError

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
        ({"corpus": [*CORPUS, {"_id": "d1", "text": "x"}]}, "corpus.jsonl, line 3", "'_id' 'd1' appears twice"),
        ({"corpus": [{"key": "d1", "text": "x"}]}, "corpus.jsonl, line 1", "no field '_id'; it has 'key', 'text'"),
        ({"corpus": [{"_id": 1.5, "text": "x"}]}, "corpus.jsonl, line 1", "'_id' must be text or an integer, got 1.5"),
        ({"corpus": [{"_id": True, "text": "x"}]}, "corpus.jsonl, line 1", "'_id' must be text or an integer"),
        ({"corpus": [{"_id": "1", "text": None}]}, "corpus.jsonl, line 1", "'text' must be text"),
        ({"corpus": [{"_id": "1", "text": "x", "title": 3}]}, "corpus.jsonl, line 1", "'title' must be text"),
        ({"corpus": lines(CORPUS) + "{"}, "corpus.jsonl, line 3", "not valid JSON"),
        ({"corpus": ""}, "corpus.jsonl", "empty"),
        ({"queries": [{"_id": "q1", "text": " "}]}, "test.tsv, line 2", "text of query 'q1' is blank"),
        ({"qrels": ""}, "test.tsv", "empty"),
        ({"qrels": "h\th\th\n"}, "test.tsv", "empty"),
        ({"qrels": QRELS.replace("\t2", "\t0").replace("\t1", "\t-1")}, "test.tsv", "no query has a relevant"),
        ({"qrels": "q1\tgone\t1\nq8\td1\t1\n"}, "test.tsv", "1 judgements of unknown documents"),
        ({"qrels": QRELS + "q1 d1\n"}, "test.tsv, line 5", "expected 3 columns separated by tabs"),
        ({"qrels": QRELS + "q1\t0\td1\t1\t1\n"}, "test.tsv, line 5", "expected 3 columns"),
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


@pytest.mark.parametrize(
    "qrels",
    [
        "q1\t0\td1\t2\nq1\t0\td2\t0\nq2\t0\td2\t1\n",
        "q1 0 d1 2\nq1 Q0  d2 0\nq2 0 d2 1\n",
        "query-id\titeration\tcorpus-id\tscore\nq1\t0\td1\t2\nq2\t0\td2\t1\n",
        "q1 d1 2\n\nq2 d2 1\n",
        'query-id\tcorpus-id\tscore\n"q1"\t"d1"\t"2"\n"q2"\t"d2"\t1.0\n',
        "corpus-id\tscore\tquery-id\nd1\t2\tq1\nd2\t1\tq2\n",
        "\ufeffqid\tdocid\trel\r\nq1\td1\t2\r\nq2\td2\t1\r\nq2\td1\t-1\r\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t0\nq1\td1\t2\nq2\td2\t1\nq2\td2\t1\n",  # the last one counts
    ],
)
def test_every_way_to_write_judgements(tmp_path, qrels):
    found = read_retrieval(layout(tmp_path / "a", qrels=qrels))
    assert found.relevant == {"q1": {"d1": 2.0}, "q2": {"d2": 1.0}}


def test_ids_with_quotation_marks_and_spaces(tmp_path):
    rows = [{"_id": '"so', "text": "x"}, {"_id": 'a "b"', "text": "y"}]
    found = read_retrieval(layout(tmp_path / "a", rows, rows, '"so\ta "b"\t1\n"a ""b"""\t"""so"\t2\n'))
    assert found.relevant == {'"so': {'a "b"': 1.0}, 'a "b"': {'"so': 2.0}}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_sets_of_other_kinds_of_files(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "a" / "qrels").mkdir(parents=True)
    judged = [{"query-id": 1, "corpus-id": d, "score": gain} for d, gain in ((7, 2), (8, 0))]
    for stem, rows in (
        ("corpus", [{"_id": 7, "title": "t", "text": "x"}, {"_id": 8, "title": "", "text": "y"}]),
        ("queries", [{"_id": 1, "text": "q"}]),
        ("qrels/dev", judged),
    ):
        path, frame = tmp_path / "a" / f"{stem}.{kind}", pandas.DataFrame(rows)
        if "jsonl" in kind:
            frame.to_json(path, orient="records", lines=True)
        else:
            getattr(frame, f"to_{kind}")(path, index=False)
    found = read_retrieval(tmp_path / "a", "dev")
    assert found == read_retrieval(f"{tmp_path / 'a'}:dev")
    assert found.corpus == {"7": "t x", "8": "y"} and found.relevant == {"1": {"7": 2.0}}


def test_integer_ids_are_those_of_the_judgements(tmp_path):
    corpus, queries = [{"_id": 0, "text": "x"}, {"_id": 1, "text": "y"}], [{"id": 12, "text": "q"}]
    folder = layout(tmp_path / "a", corpus, queries, "12\t0\t1\n")
    assert read_retrieval(folder).relevant == {"12": {"0": 1.0}}


def test_judgements_that_cannot_count_are_counted(tmp_path, caplog):
    qrels = QRELS + "q9\td1\t1\nq1\tgone\t3\nq1\tgone\t3\nq2\td1\t0\nq2\td1\t1\n"
    found = read_retrieval(layout(tmp_path / "a", qrels=qrels))
    assert found.relevant == {"q1": {"d1": 2.0, "gone": 3.0}, "q2": {"d1": 1.0, "d2": 1.0}}
    assert sorted(found.left_out.values()) == [1, 1, 2]
    for words in ("unknown queries (1)", "unknown documents, which are never found (1)", "twice"):
        assert words in caplog.text


def test_queries_without_a_relevant_document_count_if_they_are_judged(tmp_path):
    found = read_retrieval(layout(tmp_path / "a", qrels="q1\td1\t1\nq2\td1\t0\n"))
    assert found.relevant == {"q1": {"d1": 1.0}, "q2": {}} and list(found.queries) == ["q1", "q2"]


def test_blank_queries_are_only_refused_where_they_are_judged(tmp_path):
    found = read_retrieval(layout(tmp_path / "a", queries=[*QUERIES, {"_id": "q4", "text": ""}]))
    assert "q4" not in found.queries


def documents(count, ids=str):
    return [{"_id": ids(i), "title": f"title {i}", "text": f"text number {i}"} for i in range(count)]


@pytest.mark.parametrize(
    "name, same, judged, itself",
    [
        ("test-{}-pro", True, 1, True),  # ArguAna
        ("test-{}-pro", False, 1, True),  # the query is written anew
        ("{}", True, 1, True),  # Quora
        ("{}", False, 1, False),  # Cranfield: both are numbered from 1 on
        ("{}", False, 0, False),  # and the document of that number may be an answer
        ("d{}", False, 0, False),
        ("d{}", True, 0, True),
    ],
)
def test_queries_that_are_documents(tmp_path, caplog, name, same, judged, itself):
    corpus = documents(6, name.format)
    queries = [{"_id": name.format(i), "text": f"text number {i}" if same else f"what is {i}"} for i in range(4)]
    qrels = "".join(f"{name.format(i)}\t{name.format(i + judged)}\t1\n" for i in range(4))
    folder = layout(tmp_path / "a", corpus, queries, qrels)
    assert read_retrieval(folder).ignore_identical_ids is itself
    assert ("4 queries are documents" in caplog.text) is itself
    for said in (True, False):
        assert read_retrieval(folder, ignore_identical_ids=said).ignore_identical_ids is said
    with pytest.raises(OptionError):
        read_retrieval(folder, ignore_identical_ids="yes")


def test_sets_as_beir_and_sentence_transformers_hold_them():
    corpus = {7: {"title": "t", "text": "x"}, 8: {"text": "y"}, 9: "z"}
    made = Retrieval.of("made", corpus, {1: "q", 2: "r", 3: "s"}, {1: {7: 2, 8: 0}, 2: {"9", "gone"}})
    assert made.corpus == {"7": "t x", "8": "y", "9": "z"} and made.queries == {"1": "q", "2": "r"}
    assert made.relevant == {"1": {"7": 2.0}, "2": {"9": 1.0, "gone": 1.0}}
    for wrong in ({7: {"title": "t"}}, {7: 3}, {7.5: "x"}, {}):
        with pytest.raises(DataError):
            Retrieval.of("made", wrong, {1: "q"}, {1: {7: 1}})
