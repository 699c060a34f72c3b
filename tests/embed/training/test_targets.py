"""A teacher's vectors are computed once, whatever stops the job, for the texts and the teacher that they are of."""

from contextlib import nullcontext

import numpy as np
import torch

from nestling.embed.training.targets import TARGETS_FILE, Targets

from ..families import some_texts

TEXTS = list(dict.fromkeys(some_texts(40, seed=5)))


def targets(folder, teacher, texts=TEXTS, prompt=""):
    return Targets(folder, teacher, texts, prompt, nullcontext)


def counted(one, monkeypatch):
    calls, encode = [], one.teacher.encode
    monkeypatch.setattr(one.teacher, "encode", lambda texts, **k: calls.append(len(texts)) or encode(texts, **k))
    return calls


def test_rows_are_computed_once(encoder, tmp_path, monkeypatch):
    teacher = encoder()
    one = targets(tmp_path, teacher)
    calls = counted(one, monkeypatch)
    one.fill([3, 1, 2])
    one.fill([2, 3])
    assert calls == [3] and np.isnan(one.table[0]).all()
    wanted = torch.tensor(teacher.encode([TEXTS[3], TEXTS[1]], normalize_embeddings=True))
    torch.testing.assert_close(one[[3, 1]], wanted, rtol=0, atol=2e-3)
    again = targets(tmp_path, teacher)
    calls = counted(again, monkeypatch)
    again.fill([1, 2])
    assert not calls and torch.equal(again[[1, 2]], one[[1, 2]])
    again.table[2, 5:] = np.nan  # a row that was being written when the process was killed
    again.fill([1, 2])
    assert calls == [2] and again[[2]].isfinite().all()


def test_those_of_others_are_not_taken(encoder, tmp_path):
    targets(tmp_path, encoder()).fill([0, 1])
    for teacher, texts, prompt in (
        (encoder("roberta"), TEXTS, ""), (encoder(), TEXTS[::-1], ""), (encoder(), TEXTS, "w9 "),
    ):  # fmt: skip
        assert np.isnan(targets(tmp_path, teacher, texts, prompt).table).all()
    one = targets(tmp_path, encoder())
    one.fill([0, 1])
    (tmp_path / TARGETS_FILE).write_bytes(b"damaged")
    assert np.isnan(targets(tmp_path, encoder()).table).all()
