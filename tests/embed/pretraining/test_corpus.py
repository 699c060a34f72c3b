"""Corpora: windows, length buckets, passes, positions to go on from, parts of batches, and text that is no good."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.embed import Texts
from nestling.embed.pretraining.collate import Collator, MaskedBatches
from nestling.embed.pretraining.corpus import Corpus, Position
from nestling.embed.pretraining.masking import Masking
from nestling.errors import DataError, MaskingError, OptionError

from ..families import VOCAB, WORDS, some_texts, tokenizer

LONG = [" ".join(WORDS[i % 90] for i in range(start, start + count)) for start, count in ((0, 24), (7, 2), (3, 9))]


def corpus(texts, batch_size=4, length=8, **options) -> Corpus:
    return Corpus(texts, tokenizer(), length, batch_size, **options)


def ids(batch) -> list[list[int]]:
    return [window.ids.tolist() for window in batch.windows]


def read(source, count, position=None):
    stream = source.batches(position)
    return [next(stream) for _ in range(count)]


def collator(sampled=None) -> Collator:
    return Collator(Masking(4, np.arange(5, VOCAB)), 0, 3, sampled)


def test_long_texts_are_cut_into_windows_that_hold_every_token_once():
    (batch,) = read(corpus(LONG, batch_size=7), 1)
    found = Counter(token for row in ids(batch) for token in row[1:-1])
    assert found == Counter(token for row in tokenizer()(LONG)["input_ids"] for token in row[1:-1])
    for window in batch.windows:
        assert len(window.ids) <= 8 and window.ids[0] == 1 and window.ids[-1] == 2
        assert window.words.tolist() == [-1, *range(len(window.ids) - 2), -1]


def test_words_are_the_tokenizers():
    """Pieces of a word share its number; special and unknown tokens, also within a text, belong to none."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[MASK]", "[SEP]", "un", "##lock", "##ed", "door"]
    raw = Tokenizer(WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "sep_token": "[SEP]"}
    pieces = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    (batch,) = read(Corpus(["door unlocked ? [SEP] door unlock"], pieces, 16, 1), 1)
    assert ids(batch) == [[7, 4, 5, 6, 1, 3, 7, 4, 5]]
    assert batch.windows[0].words.tolist() == [0, 1, 1, 1, -1, -1, 2, 3, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(0, 12), st.integers(0, 9))
def test_reading_goes_on_the_same_from_any_batch(count, batch_size, pool, stop, seed):
    """Through pools and passes, with texts of several windows and of none that can be masked."""
    texts = [text for text in some_texts(count, seed, longest=30)] + LONG[:1]
    source = corpus(texts, batch_size, seed=seed, pool=pool)
    whole = read(source, stop + 6)
    where = whole[stop - 1].after if stop else Position()
    again = corpus(texts, batch_size, seed=seed, pool=pool)
    for expected, found in zip(whole[stop:], read(again, 6, Position(**where.to_json())), strict=True):
        assert ids(found) == ids(expected) and found.after == expected.after
        assert found.rng.random() == expected.rng.random()


@pytest.mark.parametrize("pool", [1, 2, 64])
def test_a_pass_has_every_window_and_fills_its_last_batch_with_some_again(pool):
    texts = [f"{a} {b}" for a, b in zip(WORDS[:45], WORDS[45:90], strict=True)]
    batches = read(corpus(texts, pool=pool), 12)
    expected = {tuple(row) for row in tokenizer()(texts)["input_ids"]}
    seen = Counter(tuple(row) for batch in batches for row in ids(batch))
    assert set(seen) == expected and seen.total() == 48 and max(seen.values()) <= (4 if pool == 1 else 2)
    assert [batch.after.turn for batch in batches] == [0] * 12
    following = read(corpus(texts, pool=pool), 13)[-1]
    assert following.after.turn == 1
    other = read(corpus(texts, pool=pool, seed=1), 1)[0]
    assert ids(other) != ids(batches[0]) or pool == 1


def test_batches_are_of_like_length_in_random_order():
    texts = [" ".join(WORDS[:n]) for n in range(2, 30)] * 8
    batches = read(corpus(texts, batch_size=8, length=32), 28)
    lengths = [[len(window.ids) for window in batch.windows] for batch in batches]
    assert all(max(row) - min(row) <= 1 for row in lengths)
    assert (order := [row[0] for row in lengths]) != sorted(order)


def test_texts_with_nothing_to_mask_are_left_out_and_counted():
    source = corpus(["w9", "[SEP] w8", "unknown words only", "", "w5 w6"], batch_size=2)
    (batch, _) = read(source, 2)
    assert ids(batch) == [[1, 5, 6, 2]] * 2 and source.left_out == 4
    with pytest.raises(MaskingError, match="nothing to mask in 3 texts: each has fewer than 2 words"):
        read(corpus(["w9", "nobody knows these", ""]), 1)


def test_an_endless_stream_with_nothing_to_mask_ends():
    class Endless:
        def __iter__(self):
            while True:
                yield "w9"

    with pytest.raises(MaskingError, match="nothing to mask in 10000 texts"):
        read(corpus(Endless()), 1)


def test_a_stream_without_end_is_read_as_far_as_is_needed():
    class Endless:
        read = 0

        def __iter__(self):
            for number in range(10**9):
                Endless.read = number
                yield f"{WORDS[number % 90]} {WORDS[number % 83]}"

    assert len(read(corpus(Endless(), pool=3), 5)) == 5 and Endless.read < 200


def test_rows_of_a_data_set_are_texts():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": LONG, "other": [1, 2, 3]})
    for given_rows in (rows, rows.to_iterable_dataset()):
        assert [ids(b) for b in read(corpus(given_rows), 3)] == [ids(b) for b in read(corpus(LONG), 3)]
    with pytest.raises(DataError, match=r"text 2: expected a string, or a row with a string 'text', got \{'other': 2"):
        read(corpus(["w5 w6", {"other": 2}]), 1)


def test_files_are_read_one_after_the_other(tmp_path):
    (tmp_path / "a.txt").write_text("w5 w6\nw7\n\nw8 w9\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "w10 w11"}))
    texts = Texts([tmp_path / "a.txt", str(tmp_path / "b.jsonl.gz")])
    assert list(texts) == list(texts) == ["w5 w6\nw7", "w8 w9", "w10 w11"]


def test_a_corrupt_line_is_named_or_left_out_and_counted(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [b'{"text": "w5 w6"}', b'{"text": "w5', b'{"words": "w5"}', b'{"text": 3}', b'{"text": "\xff"}', b"[1]",
             b'{"text": "w7 w8"}']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"text.jsonl, line 2: not valid JSON"):
        list(Texts([path]))
    texts = Texts([path], skip_bad=True)
    assert list(texts) == list(texts) == ["w5 w6", "w7 w8"] and texts.bad == 5
    (tmp_path / "text.txt").write_bytes(b"w5 w6\n\nw7\xff\n\nw8")
    with pytest.raises(DataError, match=r"text.txt, line 3: not UTF-8"):
        list(Texts([tmp_path / "text.txt"]))
    assert list(Texts([tmp_path / "text.txt"], skip_bad=True)) == ["w5 w6", "w8"]
    path.write_bytes(b'{"text": 3}')
    with pytest.raises(DataError, match="text.jsonl: empty"):
        list(Texts([path], skip_bad=True))


@pytest.mark.parametrize(
    "texts, error, message",
    [
        ([], DataError, "there are no texts"),
        ("w5 w6", ValueError, "not one string"),
        (iter(["w5 w6"]), ValueError, "texts can be read only once"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(texts, error, message):
    with pytest.raises(error, match=message):
        read(corpus(texts), 1)


def test_tokenizers_that_cannot_mask_are_refused():
    without = tokenizer()
    without.mask_token = None
    with pytest.raises(MaskingError, match="the tokenizer has no mask token"):
        Corpus(LONG, without, 8, 2)
    with pytest.raises(MaskingError, match="not a fast one"):
        Corpus(LONG, object(), 8, 2)
    with pytest.raises(MaskingError, match="length=3 leaves no room for words: expected 4 tokens and more"):
        Corpus(LONG, tokenizer(), 3, 2)


def test_cutting_into_windows_leaves_the_tokenizer_alone():
    mine = tokenizer()
    read(Corpus(LONG, mine, 8, 2), 1)
    assert mine.backend_tokenizer.truncation is None and len(mine(LONG[0])["input_ids"]) == 26


@pytest.mark.parametrize("options", [{}, {"sampled": 2}])
def test_parts_of_a_batch_are_its_rows(options):
    collate, texts = collator(**options), some_texts(40, longest=20)
    (whole,) = collate(read(corpus(texts, 8, 16), 1)[0])
    parts = collate(read(corpus(texts, 8, 16), 1)[0], 4)
    for name, value in whole.items():
        if name in ("share", "decoder_share"):
            torch.testing.assert_close(torch.stack([part[name] for part in parts]), (4 * value).expand(4))
        elif name == "sizes":
            assert all(part[name].equal(value) for part in parts) and value[-1] == 2 and len(value) == 2
        else:
            assert torch.cat([part[name] for part in parts]).equal(value)
    assert whole["masked"].sum() * whole["share"] == pytest.approx(1)
    assert not (whole["masked"] & (whole["attention_mask"] == 0)).any()
    assert not (whole["masked"] & ~whole["rebuilt"]).any()


def test_sampled_cups_vary_and_each_comes_as_often():
    stream = corpus(LONG).batches()
    seen = Counter(collator(sampled=2)(next(stream))[0]["sizes"][0].item() for _ in range(200))
    assert set(seen) == {0, 1} and min(seen.values()) > 70


def test_processes_and_steps_of_accumulation_share_each_batch():
    source = corpus(some_texts(40, longest=20), 8, 16)
    alone = iter(MaskedBatches(source, collator(), 5, Position()))
    shared = [iter(MaskedBatches(source, collator(), 5, Position(), rank, 2, 2)) for rank in (0, 1)]
    for _ in range(5):
        whole = next(alone)
        parts = [next(stream) for _ in range(2) for stream in shared]
        assert torch.cat([part["input_ids"] for part in parts]).equal(whole["input_ids"])
        assert {str(part["after"]) for part in parts} == {str(whole["after"])}
    assert len(MaskedBatches(source, collator(), 5, Position(), 0, 2, 2)) == 10


def test_frames_are_their_texts(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": range(3), "text": LONG})
    for given_rows in (frame, frame["text"], frame.to_dict("list"), Texts([frame]), Texts([frame.to_dict("records")])):
        assert [ids(b) for b in read(corpus(given_rows), 3)] == [ids(b) for b in read(corpus(LONG), 3)]
    with pytest.raises(DataError, match="row with a string 'text'"):
        read(corpus(frame[["id"]]), 1)
    renamed = Texts(
        [frame.rename(columns={"text": "body"}), frame["text"].tolist()[:0] or LONG], columns={"text": "body"}
    )
    assert list(Texts([frame.rename(columns={"text": "body"})], columns={"text": "body"})) == list(renamed)[:3]


def test_lines_or_documents_and_what_was_left_out(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("w5 w6\nw7 w8\n\nw9 w10\n")
    assert list(Texts([tmp_path / "a.txt"])) == ["w5 w6\nw7 w8", "w9 w10"]
    texts = Texts([tmp_path / "a.txt", ["w1", " "]], layout="lines")
    assert list(texts) == list(texts) == ["w5 w6", "w7 w8", "w9 w10", "w1"] and texts.left_out == {"blank texts": 1}
    with pytest.raises(OptionError, match="a list"):
        Texts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("text", ["今天天气很好我们去公园吧", "วันนี้อากาศดีมาก", "今日はいい天気です"])
def test_scripts_without_spaces_have_words_to_mask(text):
    """To a tokenizer that cuts at spaces, a sentence is a single word, and nothing of it could be masked."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<mask>"]
    pieces = [(name, 0.0) for name in special] + [(c, -1.0) for c in sorted({*text, "▁", "a", "b"})]
    raw = Tokenizer(Unigram(pieces, unk_id=1, byte_fallback=False))
    raw.pre_tokenizer = Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", cls_token=None
    )
    (batch,) = read(Corpus([f"ab ba {text}"], fast, 64, 1), 1)
    (window,) = batch.windows
    of_script = [
        number for number, c in zip(window.words, fast.convert_ids_to_tokens(window.ids), strict=True) if c in text
    ]
    assert len(set(of_script)) == len(of_script) >= len(text) - 1
    assert window.words.max() + 1 == len(set(window.words)) >= len(text) + 1
    (alone,) = read(Corpus([text], fast, 64, 1), 1)
    assert alone.windows[0].words.max() + 1 >= len(text)
