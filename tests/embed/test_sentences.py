"""Documents to sentences."""

from hypothesis import given
from hypothesis import strategies as st

from nestling.data import read_texts
from nestling.embed.sentences import sentences


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
