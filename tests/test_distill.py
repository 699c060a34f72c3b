import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.distill import kl_divergence


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
