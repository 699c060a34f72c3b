"""Documents to sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.data.sentences import sentences
from nestling.data.texts import read_texts
from nestling.errors import DataError, OptionError


def test_paragraphs_and_sentences():
    text = "A title\n=======\n\nThe first\nsentence is here. Is this the second one? Yes (it is).\n\nAnd e.g. a last"
    assert sentences([text]) == ["The first sentence is here.", "Is this the second one?", "And e.g. a last"]


def test_long_ones_are_cut_and_repeated_ones_left_out():
    assert sentences(["one two three four five six seven"] * 2, longest=4) == ["one two three four"]
    assert sentences(["an ox. Two do"], shortest=1) == ["an ox.", "Two do"]


def test_code_and_rules_are_left_out():
    assert sentences(["x = {1: 2, 3: 4} ** 5 % 6", "- - - - - - - -"]) == []


def test_the_built_in_pages_give_thousands():
    found = sentences(read_texts(None))
    assert len(found) > 1500 and all(4 <= len(sentence.split()) <= 60 for sentence in found)


@given(st.lists(st.text()))
def test_any_text_is_taken(texts):
    found = sentences(texts)
    assert len(found) == len(set(found)) and all("\n" not in sentence and sentence.strip() for sentence in found)


@pytest.mark.parametrize(
    "between, expected",
    [
        ("", ["今天天气很好。", "我们去公园吧！", "你想去吗？"]),
        ("", ["今日は天気がいいです。", "公園に行きましょう！"]),
        ("", ["วันนี้อากาศดีมาก"]),
        (" ", ["आज मौसम बहुत अच्छा है।", "क्या आप आना चाहते हैं?"]),
        (" ", ["الطقس جميل اليوم جدا.", "هل تريد الذهاب معي؟"]),
        (" ", ["오늘 날씨가 아주 좋습니다.", "같이 공원에 갈까요?"]),
        (" ", ["the cat sat down.", "then it ran away?", "who knows it!"]),
        (" ", ["THE CAT SAT DOWN.", "THEN IT RAN AWAY."]),
        (" ", ["Сегодня очень хорошая погода.", "пойдём вместе в парк?"]),
        (" ", ["This is Dr. Smith of Washington.", "He is e.g. here."]),
    ],
)
def test_sentences_of_many_languages(between, expected):
    text = between.join(expected)
    assert sentences([text], shortest=3) == expected
    assert sentences([text.replace(" ", "\n", 1)], shortest=3) == expected  # lines of a paragraph belong together


def test_line_breaks_are_no_spaces_in_chinese():
    assert sentences(["今天天\n气很好。"]) == ["今天天气很好。"]


def test_abbreviations_of_the_language_that_is_said():
    text = "Heute ist schon der 3. Mai im Jahr."
    assert sentences([text], language="de") == [text] != sentences([text])
    for wrong in ("", "german", 3, None):
        with pytest.raises(OptionError, match="language="):
            sentences([text], language=wrong)


@pytest.mark.parametrize("script, most", [("今", 40), ("กำ", 30)])
def test_long_texts_without_spaces_are_cut_between_characters(script, most):
    found = sentences([script * 100], longest=20)
    assert "".join(found[:1]) and all(len(piece) <= 3 * most for piece in found)
    text = "".join(f"{script}{chr(0x4E00 + i)}" for i in range(100))
    pieces = sentences([text], longest=20)
    assert "".join(pieces) == text and len(pieces) > 3
    assert not any(piece.startswith("\u0e33") for piece in pieces)


def test_what_is_left_out_is_counted():
    found = sentences(["Too short. The cat sat on it. The cat sat on it.", "x = {1: 2, 3: 4} ** 5 % 6"])
    assert found == ["The cat sat on it."]
    assert sorted(found.left_out.values()) == [1, 1, 1]


def test_texts_that_stand_by_themselves_are_taken_as_they_are(tmp_path):
    names = ["wireless mouse", "usb c cable", "Is it? It is. So there.", "x = {1: 2}", "wireless  mouse"]
    (tmp_path / "a.txt").write_text("\n".join(names))
    for source in (tmp_path / "a.txt", names):
        found = sentences(read_texts(source))
        assert found == names[:4] and found.left_out == {"sentences that are there twice": 1}
    cut = sentences(read_texts(tmp_path / "a.txt", layout="documents"), shortest=2)
    assert "It is." in cut and "x = {1: 2}" not in cut


def test_rows_and_frames_have_texts():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": [1], "text": ["The cat sat on it. Then it ran away."]})
    assert sentences(frame) == sentences(frame.to_dict("records")) == ["The cat sat on it.", "Then it ran away."]
    with pytest.raises(DataError):
        sentences(frame[["id"]])
    for wrong in ({"shortest": 0}, {"longest": -1}, {"longest": float("nan")}, {"shortest": "4"}):
        with pytest.raises(OptionError):
            sentences(["a b c d"], **wrong)
