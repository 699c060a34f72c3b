"""One door for rows: the same rows out of whatever holds them, and what is wrong with it named with its place."""

import collections
import csv
import gzip
import json
import sqlite3
from dataclasses import dataclass

import numpy as np
import pytest

from nestling.data.pairs import read_pairs, read_sts
from nestling.data.rows import open_rows
from nestling.data.tables import LARGEST
from nestling.errors import DataError, ExampleError, NestlingError, OptionError

PAIRS = [{"anchor": f'question {i}, "so"', "positive": f"answer\n{i}\tend", "negative": f"no {i}"} for i in range(600)]
SCORED = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 4} for i in range(9)]


def table(path, rows, delimiter=","):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(path, rows):
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_json_lines(tmp_path, name):
    assert read_pairs(lines(tmp_path / name, PAIRS)) == PAIRS


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.csv.gz", ","), ("a.tsv", "\t"), ("A.TSV.GZ", "\t")])
def test_tables_of_text(tmp_path, name, delimiter):
    path = tmp_path / name
    path = table(path if name != "A.TSV.GZ" else tmp_path / "A.tsv.gz", PAIRS, delimiter)
    assert read_pairs(path) == PAIRS
    scored = table(tmp_path / f"sts{''.join(path.suffixes)}", SCORED, delimiter)
    assert read_sts(scored) == SCORED and all(type(row["score"]) is float for row in read_sts(scored))


def test_what_pandas_writes_is_read(tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(PAIRS)
    frame.to_csv(tmp_path / "a.csv")  # with its index, a column without a name
    frame.to_csv(tmp_path / "a.tsv.gz", sep="\t", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv.gz", "a.jsonl", "a.parquet"):
        assert read_pairs(tmp_path / name) == PAIRS, name


def frames():
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame, arrow = pandas.DataFrame(PAIRS, index=range(7, 607)), pyarrow.Table.from_pylist(PAIRS)
    yield frame
    yield frame.convert_dtypes()
    yield {name: frame[name] for name in frame}
    yield arrow
    yield from (arrow.combine_chunks().to_batches()[0], arrow.to_reader())


def sets():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(PAIRS)
    yield from (made, made.to_iterable_dataset(), made.with_format("numpy"), made.with_format("pandas"))
    yield from (datasets.DatasetDict(train=made), datasets.IterableDatasetDict(train=made.to_iterable_dataset()))
    yield datasets.DatasetDict(train=made, test=made.select(range(3)), unsupervised=made.select(range(2)))
    yield {"first": made.select(range(200)), "second": made.select(range(200, 600))}


def objects():
    class DictLike:
        """Neither a Mapping nor a list: iterating it gives the names of its columns."""

        def __init__(self, columns):
            self.columns_ = columns

        def keys(self):
            return self.columns_.keys()

        def __iter__(self):
            return iter(self.columns_)

        def __getitem__(self, name):
            return self.columns_[name]

    class Indexed:
        """As a data set of torch: no iterator, and no IndexError at its end."""

        def __len__(self):
            return len(PAIRS)

        def __getitem__(self, place):
            return PAIRS[place % len(PAIRS)]

    @dataclass
    class Triplet:
        anchor: str
        positive: str
        negative: str

    named = collections.namedtuple("named", PAIRS[0])
    columns = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
    base = sqlite3.connect(":memory:")
    base.row_factory = sqlite3.Row
    base.execute("create table t (anchor, positive, negative)")
    base.executemany("insert into t values (:anchor, :positive, :negative)", PAIRS)
    yield from (PAIRS, tuple(PAIRS), iter(PAIRS), (row for row in PAIRS), collections.deque(PAIRS))
    yield from (columns, DictLike(columns), DictLike({k: np.array(v) for k, v in columns.items()}), Indexed())
    yield base.execute("select * from t")
    yield [named(**row) for row in PAIRS]
    yield [Triplet(**row) for row in PAIRS]
    yield [collections.UserDict(row) for row in PAIRS]
    yield [DictLike(row) for row in PAIRS]
    yield np.array([tuple(row.values()) for row in PAIRS], dtype=[(name, "U40") for name in PAIRS[0]])
    yield np.array([list(row.values()) for row in PAIRS])
    yield [tuple(row.values()) for row in PAIRS]
    yield [{name: np.str_(text) for name, text in row.items()} for row in PAIRS]


@pytest.mark.parametrize("make", [frames, sets, objects])
def test_objects_that_hold_rows(make):
    for number, data in enumerate(make()):
        found = read_pairs(data)
        assert found == PAIRS, (number, type(data))
        assert {type(text) for row in found for text in row.values()} == {str}


def test_frames_of_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(PAIRS)
    for data in (frame, frame.lazy()):
        assert read_pairs(data) == PAIRS
    assert [row for _, row in open_rows(frame["anchor"]).rows] == [row["anchor"] for row in PAIRS]


def test_columns_of_texts():
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    texts = ["one", "two words", "three"]
    series = pandas.Series(texts, index=[5, 5, 7])
    for data in (
        texts,
        np.array(texts),
        np.array(texts, object),
        series,
        pyarrow.array(texts),
        {"b": 1}.keys() and texts,
    ):
        assert [row for _, row in open_rows(data).rows] == texts
    assert [row for _, row in open_rows({"z", "a", "m"}).rows] == ["a", "m", "z"]


def test_saved_data_sets_and_folders_of_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(PAIRS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made.select(range(5))).save_to_disk(tmp_path / "two")
    assert read_pairs(tmp_path / "one") == read_pairs(tmp_path / "two") == PAIRS
    assert read_pairs(f"{tmp_path / 'two'}::test") == PAIRS[:5]
    with pytest.raises(DataError, match="no split 'dev'"):
        read_pairs(f"{tmp_path / 'two'}::dev")
    lines(tmp_path / "three.jsonl", PAIRS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "three.jsonl").rename(tmp_path / "folder" / "train.jsonl")
    assert read_pairs(tmp_path / "folder") == PAIRS


def test_tables_are_read_a_few_rows_at_a_time(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["x" * 100] * 20_000}), tmp_path / "a.parquet")
    for name in ("a.parquet", "a.csv"):
        if name == "a.csv":
            table(tmp_path / name, [{"text": "x" * 100}] * 20_000)
        rows = open_rows(tmp_path / name).rows
        assert next(rows)[1] == {"text": "x" * 100}
    assert pyarrow.total_allocated_bytes() < 8_000_000


def test_columns_by_name(tmp_path):
    rows = [{"q": row["anchor"], "a": row["positive"], "hard_neg": row["negative"], "label": 1} for row in PAIRS]
    names = {"anchor": "q", "positive": "a", "negative": "hard_neg"}
    for source in (rows, lines(tmp_path / "a.jsonl", rows), table(tmp_path / "a.csv", rows)):
        assert read_pairs(source, columns=names) == PAIRS
    assert read_pairs([tuple(row.values()) for row in PAIRS], columns={"anchor": 1, "positive": 0, "negative": 2}) == [
        {"anchor": row["positive"], "positive": row["anchor"], "negative": row["negative"]} for row in PAIRS
    ]
    swapped = read_pairs([{"anchor": "a", "positive": "b"}], columns={"anchor": "positive", "positive": "anchor"})
    assert swapped == [{"anchor": "b", "positive": "a"}]
    scored = read_sts([row | {"label": 9 - row["score"]} for row in SCORED], columns={"score": "label"})
    assert [row["score"] for row in scored] == [9 - row["score"] for row in SCORED]


@pytest.mark.parametrize(
    "columns", [{"anchr": "q"}, {"text": "q"}, "anchor=q", ["anchor"], {"anchor": 1.5}, {"anchor": None}]
)
def test_columns_that_cannot_be(columns):
    with pytest.raises(OptionError):
        read_pairs(PAIRS, columns=columns)


def test_columns_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="a.jsonl, line 1.*'question'"):
        read_pairs(lines(tmp_path / "a.jsonl", PAIRS), columns={"anchor": "question"})


def test_numbers_of_numpy_and_of_databases():
    from decimal import Decimal

    for number in (np.float32(2.5), np.float16(2.5), np.float64(2.5), np.array(2.5), Decimal("2.5")):
        assert read_sts([{**SCORED[0], "score": number}]) == [{**SCORED[0], "score": 2.5}]
    assert read_sts([{**SCORED[0], "score": np.int64(3)}])[0]["score"] == 3.0
    for bad in (np.float32("nan"), np.bool_(True), np.array([1.0]), Decimal("inf"), "2.5", None, 10**400):
        with pytest.raises(DataError, match="row 1: 'score' must be a finite number"):
            read_sts([{**SCORED[0], "score": bad}])


@pytest.mark.parametrize(
    "content, where, named",
    [
        ("anchor,positive\na,b\nc\n", "line 3", "1 cells, expected 2"),
        ("anchor,positive\na,b\nc,d,e\n", "line 3", "3 cells, expected 2"),
        ("anchor,anchor\na,b\n", "line 1", "'anchor' twice"),
        ('anchor,positive\na,"b\nc,d\n', "line 3", "unexpected end of data"),
        ('anchor,positive\na,"b"c\n', "line 2", "expected after"),
        ("anchor;positive\na;b\n", "line 2", "anchor;positive"),
        ("anchor,positive\na,\n", "line 2", "'positive' is blank"),
        ("anchor,positive\n", "a.csv", "empty"),
        ('anchor,positive\na,"' + "x" * (LARGEST + 9), "line 2", "field larger than field limit"),
    ],
)
def test_tables_that_are_none(tmp_path, content, where, named):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert str(path) in str(error.value) and where in str(error.value) and named in str(error.value)
    assert len(str(error.value)) < 600 + len(str(path))


def test_files_that_are_no_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(DataError, match="a.parquet: not a Parquet file"):
        read_pairs(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "b.parquet")
    raw = bytearray((tmp_path / "b.parquet").read_bytes())
    raw[20:900] = bytes(880)
    (tmp_path / "b.parquet").write_bytes(raw)
    with pytest.raises(DataError, match="b.parquet"):
        read_pairs(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "data",
    [
        3, None, b"bytes", object(), [], {}, {"anchor": "a", "positive": "b"},
        {"anchor": ["a"], "positive": ["b", "c"]},
        [b"a"], [None], [["a"]], np.zeros((2, 2)), np.array(3), {"dev": [{"anchor": "a"}], "test": [{"anchor": "a"}]},
    ],
)  # fmt: skip
def test_what_holds_no_pairs_is_refused(data):
    with pytest.raises(NestlingError):
        read_pairs(data)


def test_two_columns_of_one_name_in_a_frame():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="two columns called 'anchor'"):
        read_pairs(pandas.DataFrame([["a", "b", "c"]], columns=["anchor", "anchor", "positive"]))


def test_an_open_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    with path.open() as file, pytest.raises(DataError, match="open file"):
        open_rows(file)


def test_ids_and_sources_are_told_of_wherever_rows_come_from(tmp_path, caplog):
    from nestling.embed.training.data import Examples

    rows = [row | {"id": i, "source": "web", "hint": "h"} for i, row in enumerate(PAIRS)]
    found = read_pairs(lines(tmp_path / "a.jsonl", rows))
    direct = Examples.of(rows)
    assert found == PAIRS and direct.columns == {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
    assert found.left_out == direct.left_out == {f"column {name}": len(PAIRS) for name in ("id", "source", "hint")}
    assert Examples.of(found).left_out == found.left_out  # what the reader counted is not lost
    assert "column hint (600)" in caplog.text


def test_what_looks_like_a_negative_or_a_label_is_never_lost():
    from nestling.embed.training.data import Examples

    for name in ("neg", "hard_negative", "hardNegative", "neg_1", "negs", "label", "positive_2", "Negative"):
        rows = [{"anchor": "a", "positive": "b", name: "c"}]
        with pytest.raises(DataError, match=name):
            read_pairs(rows)
        with pytest.raises(ExampleError, match=name):
            Examples.of(rows)
        assert read_pairs(rows, columns={"anchor": "anchor", "positive": "positive"}) == [
            {"anchor": "a", "positive": "b"}
        ]
    assert read_pairs([{"anchor": "a", "positive": "b", "negotiation": "c"}]) == [{"anchor": "a", "positive": "b"}]


def test_lists_of_negatives():
    rows = [{"query": "q", "passage": "p", "negatives": ["m", "n"]}] * 2
    expected = {"query": "q", "passage": "p", "negative_1": "m", "negative_2": "n"}
    assert read_pairs(rows) == [expected] * 2
    assert read_pairs([rows[0] | {"negatives": np.array(["m", "n"])}]) == [expected]
    for bad in (["m"], [], "m", None, ["m", ""], ["m", 3]):
        with pytest.raises(DataError, match="row 2"):
            read_pairs([rows[0], rows[0] | {"negatives": bad}])
