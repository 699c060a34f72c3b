"""Texts with ids: whose they are in every kind of source, and what is refused."""

import pytest

from nestling.data.records import Record, read_records
from nestling.errors import DataError, OptionError


def test_ids_are_those_of_the_column_or_numbers(tmp_path):
    rows = [{"id": 7, "text": "a"}, {"id": 8, "text": " "}, {"id": 9, "text": "b"}]
    assert list(read_records(rows)) == [Record("7", "a"), Record("9", "b")]
    assert list(read_records([{"_id": "x", "text": "a"}])) == [Record("x", "a")]
    assert list(read_records(["a", "", "b"])) == [Record("0", "a"), Record("1", "b")]
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert [record.id for record in read_records(tmp_path / "lines.txt", layout="lines")] == ["0", "1"]
    (tmp_path / "table.csv").write_text("doc,body\nd1,one\nd2,two\n")
    columns = {"text": "body", "id": "doc"}
    assert list(read_records(tmp_path / "table.csv", columns=columns)) == [Record("d1", "one"), Record("d2", "two")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "row 2: the id 'a' is there twice"),
        ([{"id": "a", "text": "x"}, {"text": "y"}], "row 2: 'id' must be text or a whole number, got None"),
        ([{"id": 1.5, "text": "x"}], "row 1: 'id' must be"),
        ([{"id": True, "text": "x"}], "row 1: 'id' must be"),
        ([{"id": 1, "body": "x"}], "no field 'text'; it has 'id', 'body'"),
        ([{"id": 1, "text": 5}], "'text' must be text"),
        ([("a", "b")], "expected a column 'text'"),
        ([{"id": 1, "text": " "}], "all texts are blank"),
        ([], "empty"),
    ],
)
def test_what_cannot_be_read_is_named(rows, message):
    with pytest.raises(DataError, match=message):
        list(read_records(rows))


def test_unknown_columns_are_refused():
    with pytest.raises(OptionError, match="title is not read here|'title' is not read here"):
        list(read_records([{"text": "a"}], columns={"title": "t"}))
