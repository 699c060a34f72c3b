"""Lines of data files: whatever a file is, and however long its lines are, little memory is taken."""

import gzip
import json
import os
import resource
import time

import pytest

from nestling.data import jsonl as records
from nestling.data.pairs import read_pairs, read_sts
from nestling.data.retrieval import read_retrieval
from nestling.data.texts import read_texts
from nestling.errors import DataError
from nestling.files import reading as files


@pytest.fixture(autouse=True)
def in_little_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800 * 1024  # KiB
    assert time.process_time() - start < 10


def bomb(part: bytes, times: int) -> bytes:
    """Members of a gzip may follow each other."""
    return gzip.compress(part, 6) * times


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.csv"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/dev/urandom", "/dev/full", "gone", "itself", "folder"])
def test_what_is_no_file(tmp_path, name, target):
    path = tmp_path / name
    if target == "pipe":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if target == "itself" else target)
    for read in (read_texts, read_pairs):
        if name.endswith(("txt", "txt.gz")) and read is read_pairs:
            continue
        with pytest.raises(DataError, match=name):
            list(read(path))


@pytest.mark.parametrize(
    "part",
    [bytes(2**20), b'{"text": "a"}\n' * 2**16, b'{"anchor": "a", "positive": "b"}\n' * 2**15, b"words\n" * 2**17],
)
def test_a_gzip_that_grows_without_end(tmp_path, part):
    for name in ("a.jsonl.gz", "a.txt.gz"):
        (tmp_path / name).write_bytes(bomb(part, 2000))
        with pytest.raises(DataError, match=name):
            for _ in read_texts(tmp_path / name):
                pass


def test_what_repeats_itself_a_little_is_no_bomb(tmp_path):
    rows = b"".join(
        b'{"text": "sentence %d of a text that says much the same"}\n' % (i % 1000) for i in range(200_000)
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    assert sum(1 for _ in read_texts(tmp_path / "a.jsonl.gz")) == 200_000


def test_a_line_without_end(tmp_path, monkeypatch):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(2**40)  # zeros
    with pytest.raises(DataError, match="a.jsonl, line 1: longer than"):
        list(read_texts(tmp_path / "a.jsonl"))
    monkeypatch.setattr(records, "LARGEST", 100)
    (tmp_path / "b.txt").write_text("short\n\n" + "x" * 101 + "\n")
    with pytest.raises(DataError, match="b.txt, line 3"):
        list(read_texts(tmp_path / "b.txt"))
    (tmp_path / "b.txt").write_text("short\n\n" + "x" * 99 + "\n")
    assert len(list(read_texts(tmp_path / "b.txt"))) == 2


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "1" * 400, "1" * 5000, '{"a": 1, "a": 2}', '"\\ud800"'])
def test_values_that_no_row_has(tmp_path, value):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "bad", "meta": ' + value + "}\n")
    with pytest.raises(DataError, match="a.jsonl, line 2: not valid JSON"):
        list(read_texts(tmp_path / "a.jsonl"))
    left = []
    assert list(read_texts(tmp_path / "a.jsonl", left.append)) == ["fine"] and len(left) == 1


def test_a_number_that_is_none_where_nobody_reads_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "meta": NaN}\n{"text": "too", "meta": 1e999}\n')
    assert list(read_texts(tmp_path / "a.jsonl")) == ["fine", "too"]
    for score in ("NaN", "1e999", "1" * 309):
        row = '{"sentence1": "a", "sentence2": "b", "score": ' + score + "}\n"
        (tmp_path / "s.jsonl").write_text(row)
        with pytest.raises(DataError, match="s.jsonl, line 1"):
            read_sts(tmp_path / "s.jsonl")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_pipe_in_a_retrieval_set(tmp_path, name):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "d", "text": "a"}) + "\n")
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "a"}) + "\n")
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    assert read_retrieval(tmp_path).queries == {"q": "a"}
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=str(tmp_path)):
        read_retrieval(tmp_path)


def test_a_pipe_in_the_folder_of_a_data_set(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="train.jsonl"):
        list(read_texts(tmp_path))


def test_a_document_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nestling.data.layout.MOST_LINES", 1000)
    (tmp_path / "a.txt").write_text("one\n\n" + "line\n" * 1001)
    with pytest.raises(DataError, match="a.txt: a document of more than"):
        list(read_texts(tmp_path / "a.txt", layout="documents"))
    assert files.LARGEST >= 2**24
