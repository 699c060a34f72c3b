from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear

from nestling import losses
from nestling.losses import IGNORED, cross_entropies, head_loss, kl_divergence, similarity_kl, similarity_rows


@given(st.integers(1, 20), st.integers(2, 30), st.integers(1, 25), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_kl_is_that_of_torch(n, vocabulary, chunk, dtype):
    generator = torch.Generator().manual_seed(n)
    teacher, student = (torch.randn(n, vocabulary, generator=generator).mul(4).to(dtype) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher.double()),
        torch.distributions.Categorical(logits=student.double()),
    )
    got = kl_divergence(teacher, student, chunk)
    assert got.dtype == torch.float32 and got.shape == (n,)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(kl_divergence(teacher, teacher, chunk), torch.zeros(n))


def test_kl_has_its_direction_and_its_gradient():
    teacher = torch.tensor([[0.0, 0.0]])
    student = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]], requires_grad=True)
    got = kl_divergence(teacher, student)
    assert got.item() == pytest.approx(0.5 * (torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(2 / 3))).item())
    got.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]]))  # softmax(student) - softmax(teacher)


def test_certain_teachers_are_finite():
    teacher, student = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    assert float(kl_divergence(teacher, student)) == pytest.approx(1e4)
    assert kl_divergence(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((1, 2, 3), (1, 2, 3)), ((3,), (3,))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must both be \[N, V\]"):
        kl_divergence(*map(torch.zeros, shapes))


def head_case(n=13, width=6, vocabulary=17):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.nn.Linear(width, vocabulary).double().requires_grad_(False)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[[2, 5, n - 1]] = IGNORED
    return student.requires_grad_(), teacher, head, labels


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.25, 0.75), (0.0, 1.0)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_the_loss_through_a_head_is_that_of_whole_logits(weights, chunk):
    student, teacher, head, labels = head_case()
    kl = kl_divergence(head(teacher), head(student)).mean()
    ce = torch.nn.functional.cross_entropy(head(student), labels, ignore_index=IGNORED)
    expected = weights[0] * kl + weights[1] * ce
    (gradient,) = torch.autograd.grad(3 * expected, student)
    got = head_loss(student, teacher, head, labels, kl_weight=weights[0], ce_weight=weights[1], chunk=chunk)
    torch.testing.assert_close(torch.stack((got.loss, got.kl, got.ce)), torch.stack((expected, kl, ce)))
    (ours,) = torch.autograd.grad(3 * got.loss, student)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-12)


def test_the_loss_through_a_head_passes_gradcheck():
    student, teacher, head, labels = head_case(n=7)
    assert torch.autograd.gradcheck(
        lambda s: head_loss(s, teacher, head, labels, kl_weight=0.6, ce_weight=0.4, chunk=2).loss, student
    )


def test_a_head_without_gradients_or_labels():
    student, teacher, head, _ = head_case()
    with torch.no_grad():
        got = head_loss(student, teacher, head)
    assert not got.loss.requires_grad and float(got.ce) == 0 < float(got.kl)
    assert float(got.loss) == pytest.approx(float(got.kl), rel=1e-12)
    assert float(head_loss(student, student.detach(), head).loss) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"\[13, 6\], \[12, 6\], \[13\]"):
        head_loss(student, teacher[:12], head)


def text_columns(seed: int, count: int, batch: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, batch, width, generator=generator, dtype=torch.float64))


def softmax_of(values: list[float]) -> list[float]:
    weights = [exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def kl_of(teacher: list[float], student: list[float]) -> float:
    return sum(p * log(p / q) for p, q in zip(softmax_of(teacher), softmax_of(student), strict=True))


def scores(vectors: list[torch.Tensor], query: int) -> list[float]:
    """Of one query with the texts that it is ranked over."""
    q = vectors[0][query]
    if len(vectors) == 1:
        return [float(q @ v) for i, v in enumerate(vectors[0]) if i != query]
    return [float(q @ v) for column in vectors[1:] for v in column]


@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_similarity_kl_is_the_sum_written_out(seed, count, batch, wide, narrow):
    teacher, student = text_columns(seed, count, batch, wide), text_columns(seed + 1, count, batch, narrow)
    rows = [kl_of([s / 0.5 for s in scores(teacher, i)], [s / 0.5 for s in scores(student, i)]) for i in range(batch)]
    found = similarity_kl(teacher, student, 0.5)
    assert float(found) == pytest.approx(sum(rows) / batch, rel=1e-5, abs=1e-7)
    assert float(similarity_kl(teacher, teacher, 0.3)) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(narrow, narrow, dtype=torch.float64))[0]
    turned = similarity_kl(teacher, [column @ turn for column in student], 0.5)
    torch.testing.assert_close(turned, found)  # a rotation of the student changes nothing


def test_similarity_rows():
    first, second, third = text_columns(0, 3, 2, 4)
    assert similarity_rows([first, second, third]).shape == (2, 4)
    torch.testing.assert_close(similarity_rows([first, second, third])[1, 2], first[1] @ third[0])
    assert similarity_rows([first]).tolist() == [[float(first[0] @ first[1])], [float(first[0] @ first[1])]]
    assert similarity_rows([first[:1]]).shape == (1, 0)


def test_large_scores_do_not_overflow():
    teacher, student = [1e4 * column for column in text_columns(0, 2, 3, 4)], text_columns(1, 2, 3, 4)
    student = [column.requires_grad_() for column in student]
    value = similarity_kl(teacher, student, 0.05)
    value.backward()
    assert value.isfinite() and all(column.grad.isfinite().all() for column in student)


def output_case(dtype=torch.float64, count=37, width=8, size=50, bias=True):
    rng = torch.Generator().manual_seed(0)
    states, matrix = (torch.randn(n, width, generator=rng, dtype=dtype).requires_grad_() for n in (count, size))
    offset = torch.randn(size, generator=rng, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(size, (count,), generator=rng)
    return states, matrix, offset, labels, torch.rand(count, generator=rng, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
def test_losses_and_gradients_are_those_of_all_logits(chunk, bias):
    states, matrix, offset, labels, weights = output_case(bias=bias)
    found = cross_entropies(states, matrix, offset, labels, weights, chunk)
    each = cross_entropy(linear(states, matrix, offset), labels, reduction="none")
    torch.testing.assert_close(found.each, each)
    given = [x for x in (states, matrix, offset) if x is not None]
    expected = torch.autograd.grad(3 * (each * weights).sum(), given)
    torch.testing.assert_close(torch.autograd.grad(3 * found.loss, given), expected)
    assert not found.each.requires_grad


def test_what_is_not_trained_gets_no_gradient():
    states, matrix, offset, labels, weights = output_case()
    cross_entropies(states.detach(), matrix, offset.detach(), labels, weights).loss.backward()
    assert matrix.grad is not None and states.grad is None and offset.grad is None
    with torch.no_grad():
        assert not cross_entropies(states, matrix, offset, labels, weights).loss.requires_grad


def test_huge_logits_stay_finite():
    states, matrix, offset, labels, weights = output_case(torch.float32)
    found = cross_entropies(1e4 * states, matrix, offset, labels, weights)
    each = cross_entropy(linear(1e4 * states, matrix, offset), labels, reduction="none")
    torch.testing.assert_close(found.each, each)
    found.loss.backward()
    assert all(x.grad.isfinite().all() for x in (states, matrix, offset))


def test_autocast_multiplies_in_bf16_and_adds_in_fp32():
    states, matrix, offset, labels, weights = output_case(torch.float32, count=200)
    expected = cross_entropies(states, matrix, offset, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropies(states, matrix, offset, labels, weights, 16)
    assert found.loss.dtype == found.each.dtype == torch.float32
    assert found.loss != expected.loss and found.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    found.loss.backward()
    assert matrix.grad.dtype == states.grad.dtype == torch.float32


def test_no_chunk_has_more_logits_than_are_allowed(monkeypatch):
    states, matrix, offset, labels, weights = output_case()
    seen = []
    monkeypatch.setattr(losses, "linear", lambda x, *rest: seen.append(linear(x, *rest)) or seen[-1])
    monkeypatch.setattr(losses, "LOGITS", 500)
    cross_entropies(states, matrix, offset, labels, weights)
    assert [len(logits) for logits in seen] == [10, 10, 10, 7]


def test_shapes_of_cross_entropies_are_checked():
    states, matrix, offset, labels, weights = output_case()
    with pytest.raises(ValueError, match=r"expected states \[N, H\], labels \[N\] and weights \[N\], got .*\[36\]"):
        cross_entropies(states, matrix, offset, labels[1:], weights)
