"""Readers: what they yield, and that whatever is wrong with a file is a DataError that names it."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.data.texts import read_multiple_choice, read_texts
from nestling.errors import DataError

QUESTION = {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
same_folder = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, content: bytes | str) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def rows(*objects) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_text_is_split_at_blank_lines(tmp_path, name):
    path = write(tmp_path / name, "\ufeff\n\n first\n  line two\n \t \n\nzweites Stück\r\n\r\nlast\u2028same")
    assert list(read_texts(path)) == ["first\n  line two", "zweites Stück", "last\u2028same"]
    assert list(read_texts(str(path))) == list(read_texts(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_yields_the_field_text(tmp_path, name):
    path = write(
        tmp_path / name, rows({"text": "one\n\nstill one", "id": 1}) + "\n" + rows({"text": " "}, {"text": "two"})
    )
    assert list(read_texts(path)) == ["one\n\nstill one", "two"]


def test_without_a_source_the_help_pages_of_python():
    pages = list(read_texts())
    assert pages == list(read_texts(None))
    assert len(pages) > 50 and sum(map(len, pages)) > 300_000
    assert all(page.strip() for page in pages)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "", "empty"),
        ("a.txt", " \n\n", "empty"),
        ("a.jsonl.gz", "", "empty"),
        ("a.jsonl", rows({"text": ""}), "empty"),
        ("a.txt", b"good\nb\xe4d\n", "line 2: not UTF-8 (byte 2"),
        ("a.txt", "x".encode("utf-16"), "line 1: not UTF-8"),
        ("a.csv", "x", "empty"),
        ("a.xls", "x", "unknown kind of file; expected .txt"),
        ("a.jsonl", rows({"text": "x"}) + "{", "line 2: not valid JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: not valid JSON"),
        ("a.jsonl", "[]", "line 1: expected a JSON object, got []"),
        ("a.jsonl", rows({"body": "x"}), "line 1: no field 'text'; it has 'body'"),
        ("a.jsonl", rows({"text": 3}), "line 1: 'text' must be text, got 3"),
        ("a.jsonl", rows({"text": "\ud800"}), "half a surrogate pair"),
    ],
)
def test_unusable_text_is_refused(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        list(read_texts(path))
    assert expected in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-9], lambda raw: raw[:9], lambda raw: b"plain text", lambda raw: raw[:20] + b"\xff" * 20],
)
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_gzip_is_refused(tmp_path, name, damage):
    path = write(tmp_path / name, rows(*({"text": f"document {i}"} for i in range(500))))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="gzip"):
        list(read_texts(path))


def test_missing_files_fail_on_the_call(tmp_path):
    for name in ("a.txt", "a.jsonl.gz"):
        with pytest.raises(DataError, match="no such file"):
            read_texts(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="not a file"):
        read_texts(tmp_path / "folder.txt")
    with pytest.raises(DataError, match="unknown kind"):
        read_texts("")


class Sets(types.ModuleType):
    """Stands in for the package `datasets`: keeps what it was asked for and gives the rows it was made with."""

    def __init__(self, rows):
        super().__init__("datasets")
        self.__spec__ = types.SimpleNamespace()  # find_spec looks here
        self.rows, self.asked = rows, None

    def load_dataset(self, path, config, *, split, streaming):
        self.asked = (path, config, split, streaming)
        if isinstance(self.rows, Exception):
            raise self.rows
        return iter(self.rows)


@pytest.mark.parametrize(
    "name, asked",
    [
        ("org/set", ("org/set", None, "train", True)),
        ("s:c", ("s", "c", "train", True)),
        ("s::test", ("s", None, "test", True)),
    ],
)
def test_data_sets_are_streamed(monkeypatch, name, asked):
    sets = Sets([{"text": "a"}, {"text": ""}, {"text": "b"}])
    monkeypatch.setitem(sys.modules, "datasets", sets)
    assert list(read_texts(name)) == ["a", "b"]
    assert sets.asked == asked


@pytest.mark.parametrize(
    "given_rows, expected",
    [
        (ConnectionError("hub is away"), "nor a data set that can be opened.*hub is away"),
        ([{"text": "a"}, {"body": "b"}], "org/set, row 2: no field 'text'; it has 'body'"),
        ([{"text": "a"}, None], "org/set: reading stopped after row 2"),
        ([], "empty"),
    ],
)
def test_unusable_data_sets_are_refused(monkeypatch, given_rows, expected):
    monkeypatch.setitem(sys.modules, "datasets", Sets(given_rows))
    with pytest.raises(DataError, match=expected):
        list(read_texts("org/set"))


def test_data_sets_need_their_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'nestling\[data\]'"):
        read_texts("org/set")


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_multiple_choice(tmp_path, name):
    path = write(tmp_path / name, rows({**QUESTION, "id": "x"}, {**QUESTION, "answer": 0}))
    assert read_multiple_choice(path) == [QUESTION, {**QUESTION, "answer": 0}]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"question": None}, "'question' must be text, got None"),
        ({"question": " "}, "blank"),
        ({"choices": "34"}, "'choices' must be a list of two or more texts, got '34'"),
        ({"choices": ["4"]}, "two or more"),
        ({"choices": ["3", 4]}, r"'choices\[1\]' must be text, got 4"),
        ({"choices": ["3", ""]}, "blank"),
        ({"answer": "1"}, "'answer' must be an integer, got '1'"),
        ({"answer": True}, "'answer' must be an integer"),
        ({"answer": 1.0}, "'answer' must be an integer"),
        ({"answer": 2}, r"'answer' must be in 0..1 \(it counts from 0\), got 2"),
        ({"answer": -1}, "got -1"),
    ],
)
def test_unusable_questions_are_refused(tmp_path, change, expected):
    path = write(tmp_path / "q.jsonl", rows(QUESTION, {**QUESTION, **change}))
    with pytest.raises(DataError, match=f"line 2: .*{expected}"):
        read_multiple_choice(path)


@pytest.mark.parametrize("field", list(QUESTION))
def test_every_field_of_a_question_is_needed(tmp_path, field):
    path = write(tmp_path / "q.jsonl", rows({key: value for key, value in QUESTION.items() if key != field}))
    with pytest.raises(DataError, match=f"line 1: no field '{field}'"):
        read_multiple_choice(path)


def test_questions_are_jsonl(tmp_path):
    with pytest.raises(DataError, match=r"unknown kind of file; expected .jsonl"):
        read_multiple_choice(write(tmp_path / "q.json", rows(QUESTION)))
    with pytest.raises(DataError, match="no such file"):
        read_multiple_choice(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="empty"):
        read_multiple_choice(write(tmp_path / "q.jsonl", "\n"))


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1)


@same_folder
@given(texts=texts)
def test_what_is_written_is_read(tmp_path, texts):
    path = write(tmp_path / "a.jsonl", rows(*({"text": text} for text in texts)))
    assert list(read_texts(path)) == texts


@same_folder
@given(content=st.binary(), name=st.sampled_from(["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"]), packed=st.booleans())
def test_no_bytes_crash_the_readers(tmp_path, content, name, packed):
    path = write(tmp_path / name, content)
    if not packed:
        path.write_bytes(content)
    for read in (read_texts, read_multiple_choice):
        try:
            assert all(item for item in read(path))
        except DataError as error:
            assert name in str(error)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3),
    max_leaves=5,
)


@same_folder
@given(row=st.fixed_dictionaries({}, optional={key: anything | st.just(value) for key, value in QUESTION.items()}))
def test_no_row_crashes_the_reader_of_questions(tmp_path, row):
    try:
        (question,) = read_multiple_choice(write(tmp_path / "q.jsonl", rows(row)))
        assert 0 <= question["answer"] < len(question["choices"])
    except DataError as error:
        assert "line 1" in str(error)


def test_questions_of_frames_and_data_sets(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    given_rows = [QUESTION, {**QUESTION, "answer": 0}]
    frame, made = pandas.DataFrame(given_rows), datasets.Dataset.from_list(given_rows)
    frame.to_parquet(tmp_path / "q.parquet")
    for source in (
        given_rows,
        frame,
        made,
        made.with_format("numpy"),
        made.to_iterable_dataset(),
        tmp_path / "q.parquet",
    ):
        assert read_multiple_choice(source) == given_rows
    for wrong in ([], [3], [["a"]], frame[["question"]], [{**QUESTION, "choices": "ab"}]):
        with pytest.raises(DataError):
            read_multiple_choice(wrong)
