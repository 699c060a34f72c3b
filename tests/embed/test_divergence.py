"""Divergences between cups against sums written out."""

from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.embed.divergence import coordinate_kl, similarity_kl, similarity_rows


def columns(seed: int, count: int, batch: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, batch, width, generator=generator, dtype=torch.float64))


def softmax(values: list[float]) -> list[float]:
    weights = [exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def kl(teacher: list[float], student: list[float]) -> float:
    return sum(p * log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True))


def scores(vectors: list[torch.Tensor], query: int) -> list[float]:
    """Of one query with the texts that it is ranked over."""
    q = vectors[0][query]
    if len(vectors) == 1:
        return [float(q @ v) for i, v in enumerate(vectors[0]) if i != query]
    return [float(q @ v) for column in vectors[1:] for v in column]


@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_similarity_kl_is_the_sum_written_out(seed, count, batch, wide, narrow):
    teacher, student = columns(seed, count, batch, wide), columns(seed + 1, count, batch, narrow)
    rows = [kl([s / 0.7 for s in scores(teacher, i)], [s / 0.5 for s in scores(student, i)]) for i in range(batch)]
    found = similarity_kl(teacher, student, 0.5, 0.7)
    assert float(found) == pytest.approx(sum(rows) / batch, rel=1e-5, abs=1e-7)
    assert float(similarity_kl(teacher, teacher, 0.3, 0.3)) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(narrow, narrow, dtype=torch.float64))[0]
    turned = similarity_kl(teacher, [column @ turn for column in student], 0.5, 0.7)
    torch.testing.assert_close(turned, found)  # a rotation of the student changes nothing


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_coordinate_kl_is_the_sum_written_out(seed, count, batch, narrow, more):
    teacher, student = columns(seed, count, batch, narrow + more), columns(seed + 1, count, batch, narrow)
    rows = [
        kl([float(v) / 0.3 for v in t[:narrow]], [float(v) / 0.3 for v in s])
        for ts, ss in zip(teacher, student, strict=True)
        for t, s in zip(ts, ss, strict=True)
    ]
    assert float(coordinate_kl(teacher, student, 0.3)) == pytest.approx(sum(rows) / len(rows), rel=1e-5, abs=1e-7)


def test_rows():
    first, second, third = columns(0, 3, 2, 4)
    assert similarity_rows([first, second, third]).shape == (2, 4)
    torch.testing.assert_close(similarity_rows([first, second, third])[1, 2], first[1] @ third[0])
    assert similarity_rows([first]).tolist() == [[float(first[0] @ first[1])], [float(first[0] @ first[1])]]
    assert similarity_rows([first[:1]]).shape == (1, 0)


def test_large_scores_do_not_overflow():
    teacher, student = [1e4 * column for column in columns(0, 2, 3, 4)], columns(1, 2, 3, 4)
    student = [column.requires_grad_() for column in student]
    value = similarity_kl(teacher, student, 0.05, 0.05)
    value.backward()
    assert value.isfinite() and all(column.grad.isfinite().all() for column in student)
