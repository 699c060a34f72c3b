"""Text of tokens as they come: nothing is lost, no half characters, and nothing of a stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nestling.integrations.serve.pieces import Pieces


def of_bytes() -> PreTrainedTokenizerFast:
    """One token for each byte, so that most characters of the world take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def of_words() -> PreTrainedTokenizerFast:
    """Words with the mark of SentencePiece, whose first space is not shown."""
    raw = Tokenizer(models.WordLevel({"</s>": 0, "▁the": 1, "▁sea": 2, "s": 3, "▁": 4}, unk_token="▁"))
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


BYTES = of_bytes()


@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_together_the_text(text):
    pieces = Pieces(BYTES)
    told = [pieces.add(token) for token in BYTES(text)["input_ids"]]
    assert all(piece.isascii() or "\ufffd" not in piece or "\ufffd" in text for piece in told)
    assert "".join(told) + pieces.end() == text


@given(st.lists(st.integers(0, 256), max_size=30))
def test_bytes_that_are_no_text_are_told_as_the_tokenizer_tells_them(tokens):
    pieces = Pieces(BYTES)
    told = "".join(pieces.add(token) for token in tokens) + pieces.end()
    assert told == BYTES.decode(tokens, skip_special_tokens=True)


def test_spaces_between_words_are_kept():
    tokenizer, tokens = of_words(), [1, 2, 3, 1, 2]
    pieces = Pieces(tokenizer)
    assert "".join(pieces.add(token) for token in tokens) + pieces.end() == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens) == "the seas the sea"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_its_first_stop(text, stops):
    pieces, told = Pieces(BYTES, tuple(stops)), ""
    for token in BYTES(text)["input_ids"]:
        told += pieces.add(token)
        assert not any(stop in told for stop in stops)
        if pieces.stopped:
            break
    told += pieces.end()
    ends = [text[: n + 1] for n in range(len(text)) if any(text[: n + 1].endswith(stop) for stop in stops)]
    if ends:
        longest = max((stop for stop in stops if ends[0].endswith(stop)), key=len)
        assert pieces.stopped and told == ends[0][: len(ends[0]) - len(longest)]
    else:
        assert not pieces.stopped and told == text


@pytest.mark.parametrize("end", ["é".encode()[:1], "日".encode()[:2]])
def test_half_a_character_at_the_end_is_told_at_the_end(end):
    pieces = Pieces(BYTES)
    alphabet = BYTES("".join(chr(b) for b in b"ab"))["input_ids"]
    half = BYTES("é" if len(end) == 1 else "日")["input_ids"][: len(end)]
    told = [pieces.add(token) for token in [*alphabet, *half]]
    assert "".join(told) == "ab" and pieces.end() == "\ufffd"
