"""Cross-entropies in chunks against torch's own over all logits: values, gradients, types, memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from nestling import vocabulary
from nestling.vocabulary import cross_entropies


def case(dtype=torch.float64, count=37, width=8, size=50, bias=True):
    rng = torch.Generator().manual_seed(0)
    states, matrix = (torch.randn(n, width, generator=rng, dtype=dtype).requires_grad_() for n in (count, size))
    offset = torch.randn(size, generator=rng, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(size, (count,), generator=rng)
    return states, matrix, offset, labels, torch.rand(count, generator=rng, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
def test_losses_and_gradients_are_those_of_all_logits(chunk, bias):
    states, matrix, offset, labels, weights = case(bias=bias)
    found = cross_entropies(states, matrix, offset, labels, weights, chunk)
    each = cross_entropy(linear(states, matrix, offset), labels, reduction="none")
    torch.testing.assert_close(found.each, each)
    given = [x for x in (states, matrix, offset) if x is not None]
    expected = torch.autograd.grad(3 * (each * weights).sum(), given)
    torch.testing.assert_close(torch.autograd.grad(3 * found.loss, given), expected)
    assert not found.each.requires_grad


def test_what_is_not_trained_gets_no_gradient():
    states, matrix, offset, labels, weights = case()
    cross_entropies(states.detach(), matrix, offset.detach(), labels, weights).loss.backward()
    assert matrix.grad is not None and states.grad is None and offset.grad is None
    with torch.no_grad():
        assert not cross_entropies(states, matrix, offset, labels, weights).loss.requires_grad


def test_huge_logits_stay_finite():
    states, matrix, offset, labels, weights = case(torch.float32)
    found = cross_entropies(1e4 * states, matrix, offset, labels, weights)
    each = cross_entropy(linear(1e4 * states, matrix, offset), labels, reduction="none")
    torch.testing.assert_close(found.each, each)
    found.loss.backward()
    assert all(x.grad.isfinite().all() for x in (states, matrix, offset))


def test_autocast_multiplies_in_bf16_and_adds_in_fp32():
    states, matrix, offset, labels, weights = case(torch.float32, count=200)
    expected = cross_entropies(states, matrix, offset, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropies(states, matrix, offset, labels, weights, 16)
    assert found.loss.dtype == found.each.dtype == torch.float32
    assert found.loss != expected.loss and found.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    found.loss.backward()
    assert matrix.grad.dtype == states.grad.dtype == torch.float32


def test_no_chunk_has_more_logits_than_are_allowed(monkeypatch):
    states, matrix, offset, labels, weights = case()
    seen = []
    monkeypatch.setattr(vocabulary, "linear", lambda x, *rest: seen.append(linear(x, *rest)) or seen[-1])
    monkeypatch.setattr(vocabulary, "LOGITS", 500)
    cross_entropies(states, matrix, offset, labels, weights)
    assert [len(logits) for logits in seen] == [10, 10, 10, 7]


def test_shapes_are_checked():
    states, matrix, offset, labels, weights = case()
    with pytest.raises(ValueError, match=r"expected states \[N, H\], labels \[N\] and weights \[N\], got .*\[36\]"):
        cross_entropies(states, matrix, offset, labels[1:], weights)
