"""Whether texts stand by themselves or are documents: found out, told, and said by the user."""

import gzip
import json
import logging

import pytest

from nestling.data.layout import words
from nestling.data.texts import read_texts
from nestling.errors import DataError, OptionError

TITLES = [f"Stainless steel water bottle number {i} with lid" for i in range(200)]
PROSE = "It was a long day, and nobody had slept. " * 12


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def lines(rows):
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text, layout, texts",
    [
        ("\n".join(TITLES), "lines", TITLES),
        ("\n\n".join(TITLES), "documents", TITLES),
        ("\n".join(TITLES[:100]) + "\n\n" + "\n".join(TITLES[100:]), "lines", TITLES),  # a stray blank line
        ("\n" + "\r\n".join(TITLES) + "\r\n\r\n\r\n", "lines", TITLES),  # and some around
        ("a\nb\n\nc\nd\n", "documents", ["a\nb", "c\nd"]),
        (f"{PROSE}\n{PROSE}x\n", "documents", [PROSE.strip(), PROSE + "x"]),  # a document a line
        (
            "wireless mouse\nusb c cable\n无线鼠标\nเมาส์ไร้สาย\n",
            "lines",
            ["wireless mouse", "usb c cable", "无线鼠标", "เมาส์ไร้สาย"],
        ),
        ("one line alone", "documents", ["one line alone"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files(tmp_path, name, text, layout, texts):
    found = read_texts(write(tmp_path / name, text))
    assert found.layout == layout and list(found) == texts


def test_the_user_has_the_last_word(tmp_path):
    path = write(tmp_path / "a.txt", "a\nb\n\nc\nd\n")
    for layout, texts in (("lines", ["a", "b", "c", "d"]), ("documents", ["a\nb", "c\nd"])):
        found = read_texts(path, layout=layout)
        assert found.layout == layout and list(found) == texts
    path = write(tmp_path / "b.txt", "\n".join(TITLES))
    assert list(read_texts(path, layout="documents")) == ["\n".join(TITLES)]
    for wrong in ("line", None, True, 3):
        with pytest.raises(OptionError):
            read_texts(path, layout=wrong)


@pytest.mark.parametrize(
    "texts, layout", [(TITLES, "lines"), ([PROSE] * 3, "documents"), ([*TITLES[:3], PROSE], "documents")]
)
def test_rows_are_short_or_long(tmp_path, texts, layout):
    for source in (write(tmp_path / "a.jsonl", lines(texts)), texts, iter(texts), [{"text": text} for text in texts]):
        found = read_texts(source)
        assert found.layout == layout and list(found) == texts
    assert read_texts(texts, layout="documents").layout == "documents"
    assert read_texts().layout == "documents"


def test_what_is_taken_for_granted_is_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = read_texts(write(tmp_path / "a.txt", "\n".join(TITLES)))
    assert not caplog.text  # nothing has been read
    assert len(list(found)) == 200 and found.layout == "lines"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "a.txt" in record.message and "a text of its own" in record.message
    caplog.clear()
    list(read_texts(write(tmp_path / "a.txt", "a\n\nb")))
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_blank_texts_are_counted(caplog):
    caplog.set_level(logging.INFO)
    found = read_texts(["a b", " ", "c d", "\n", ""])
    assert list(found) == ["a b", "c d"] and found.left_out == {"blank texts": 3}
    assert "list: left out: blank texts (3)" in caplog.text


def test_texts_in_columns_of_other_names(tmp_path):
    rows = [{"body": "one", "id": 1}, {"body": "two", "id": 2}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for source in (rows, path, write(tmp_path / "a.csv", "id,body\n1,one\n2,two\n")):
        assert list(read_texts(source, columns={"text": "body"})) == ["one", "two"]
        with pytest.raises(DataError, match="no field 'text'; it has .*'body'"):
            list(read_texts(source))
    with pytest.raises(OptionError, match="no columns"):
        read_texts(write(tmp_path / "a.txt", "x"), columns={"text": "body"})
    with pytest.raises(OptionError, match="no columns"):
        read_texts(columns={"text": "body"})
    with pytest.raises(OptionError, match="'anchor' is not read here"):
        read_texts(rows, columns={"anchor": "body"})


def test_frames_and_data_sets_hold_texts():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    frame = pandas.DataFrame({"text": TITLES, "id": range(200)})
    made = datasets.Dataset.from_pandas(frame)
    for source in (
        frame,
        frame["text"],
        made,
        made["text"],
        made.to_iterable_dataset(),
        {"train": made, "test": made},
    ):
        assert list(read_texts(source)) == TITLES


@pytest.mark.parametrize("data", [3, object(), b"x", [3], [None], [["a", "b"]], [{"text": 3}], {"text": "one"}])
def test_what_holds_no_texts_is_refused(data):
    with pytest.raises(DataError):
        list(read_texts(data))


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("two words", 2),
        ("a - b", 3),
        ("今天天气很好。", 6),
        ("คุณอยากไปไหม", 4),
        ("오늘 날씨가 좋다", 3),
        ("GPU が好き", 4),
    ],
)
def test_words_of_any_script(text, count):
    assert words(text) == count
