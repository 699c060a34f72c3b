import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.data.windows import answer_windows, token_windows
from nestling.errors import DataError, TextTooShortError
from nestling.losses import IGNORED


class Letters:
    """A tokenizer of letters."""

    def __init__(self, eos: int | None = 0):
        self.eos_token_id = eos

    def __call__(self, text: str, **options):
        return {"input_ids": [ord(c) for c in text]}


texts = st.lists(st.text("abc", max_size=9), max_size=9)


@given(texts, st.integers(1, 12), st.sampled_from([None, 0, 7]))
def test_texts_are_packed_with_eos_between_them(texts, length, eos):
    stream = [i for text in texts for i in (*map(ord, text), *([] if eos is None else [eos]))]
    expected = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not expected:
        with pytest.raises(TextTooShortError, match=f"one window of {length} tokens"):
            list(token_windows(Letters(eos), texts, length))
        return
    windows = list(token_windows(Letters(eos), iter(texts), length))
    assert [w.tolist() for w in windows] == expected
    assert {w.dtype for w in windows} == {torch.int64} and {w.shape for w in windows} == {(length,)}
    assert [w.tolist() for w in token_windows(Letters(eos), texts, length, limit=2)] == expected[:2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_rows_of_ids_are_cut_and_never_joined(dtype):
    ids = torch.arange(14).view(2, 7).to(dtype)
    windows = list(token_windows(None, ids, 3))
    assert [w.tolist() for w in windows] == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert {w.dtype for w in windows} == {torch.int64}
    assert len(list(token_windows(None, ids, 3, limit=3))) == 3


def test_texts_are_read_no_further_than_needed():
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield "abcd"

    assert len(list(token_windows(Letters(), source(), 5, limit=3))) == 3
    assert len(read) == 3


def test_errors():
    with pytest.raises(TextTooShortError):
        list(token_windows(None, torch.zeros(3, 4, dtype=torch.long), 5))
    with pytest.raises(ValueError, match=r"integer tensor \[n, T\], got torch.float32"):
        list(token_windows(None, torch.zeros(3, 4), 2))
    with pytest.raises(ValueError, match=r"\[4\]"):
        list(token_windows(None, torch.zeros(4, dtype=torch.long), 2))
    with pytest.raises(ValueError, match="not one string"):
        list(token_windows(Letters(), "abc", 2))
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        list(token_windows(None, ["abc"], 2))
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        list(token_windows(Letters(), ["abc"], 0))
    assert issubclass(TextTooShortError, ValueError)


def test_answers_are_learned_and_prompts_are_not():
    ids, labels = answer_windows(Letters(), [("ab", "c"), ("d", "efgh"), ("a", "b")], 5)
    a, b, c = map(ord, "abc")
    assert ids.tolist() == [[a, b, c, 0, 0], [a, b, 0, 0, 0]]  # the second does not fit
    assert labels.tolist() == [[IGNORED, IGNORED, c, 0, IGNORED], [IGNORED, b, 0, IGNORED, IGNORED]]
    with pytest.raises(TextTooShortError, match="no prompt and answer fit into 3 tokens"):
        answer_windows(Letters(), [("ab", "c")], 3)
    with pytest.raises(ValueError, match="no EOS token"):
        answer_windows(Letters(None), [("a", "b")], 5)


def test_rows_with_a_column_of_texts_are_its_texts():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{"id": i, "text": text} for i, text in enumerate(["abc", "b", "cabca"])]
    expected = [w.tolist() for w in token_windows(Letters(), [row["text"] for row in rows], 3)]
    frame, made = pandas.DataFrame(rows), datasets.Dataset.from_list(rows)
    for texts in (rows, frame, frame["text"], made, made.to_iterable_dataset(), frame.to_dict("list"), iter(rows)):
        assert [w.tolist() for w in token_windows(Letters(), texts, 3)] == expected
    with pytest.raises(DataError, match="row 1: no field 'text'; it has 'id'"):
        list(token_windows(Letters(), frame[["id"]], 3))
    for wrong in (["abc", 3], ["abc", None], 3, [[1, 2, 3]], b"abc"):
        with pytest.raises(DataError):
            list(token_windows(Letters(), wrong, 3))


def test_prompts_with_answers_may_be_rows():
    pandas = pytest.importorskip("pandas")
    pairs = [("ab", "c"), ("a", "b")]
    frame = pandas.DataFrame(pairs, columns=["prompt", "answer"])
    expected = answer_windows(Letters(), pairs, 5)
    for data in (frame, frame.assign(id=1), frame.to_dict("records")):
        assert all(a.equal(b) for a, b in zip(answer_windows(Letters(), data, 5), expected, strict=True))
    for wrong in (frame.rename(columns={"answer": "an"}), ["ab"], [("a", "b", "c")], [("a", 3)]):
        with pytest.raises(DataError, match="row 1"):
            answer_windows(Letters(), wrong, 5)
