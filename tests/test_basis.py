"""The closed forms against brute force: optimal, exact, nested."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.basis import Cayley, NestedBasis, balanced, pca


def spd(*shape: int, seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    """Random symmetric positive definite matrices ``[..., d, d]`` with a decaying spectrum, fp64."""
    generator = torch.Generator().manual_seed(seed)
    d = shape[-1]
    q = torch.linalg.qr(torch.randn(*shape, d, generator=generator, dtype=torch.float64))[0]
    scale = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5
    return (q * (scale * decay ** torch.arange(d))[..., None, :]) @ q.mT


def error(c, m, projection) -> torch.Tensor:
    """``E ||x - x P||^2_M`` of row vectors with second moment c."""
    rest = torch.eye(c.shape[-1], dtype=c.dtype) - projection
    return torch.einsum("...ji,...jk,...kl,...li->...", rest, c, rest, m)


def keep(basis: NestedBasis, r: int) -> torch.Tensor:
    return basis.encode[..., :r] @ basis.decode[..., :r, :]


def best_by_descent(c, m, r: int) -> float:
    """The smallest error of any rank-r map that alternating least squares finds from several starts."""
    best = torch.inf
    for start in range(4):
        generator = torch.Generator().manual_seed(start)
        a = torch.randn(len(c), r, generator=generator, dtype=c.dtype)
        for _ in range(400):  # x A B: the best B for A is a regression, then the best A for B is one
            b = torch.linalg.solve(a.mT @ c @ a, a.mT @ c)
            a = m @ b.mT @ torch.linalg.inv(b @ m @ b.mT)
        best = min(best, float(error(c, m, a @ b)))
    return best


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_balanced_is_the_brute_force_optimum(r):
    c, m = spd(6, seed=1), spd(6, seed=2)
    basis = balanced(c, m)
    measured = float(error(c, m, keep(basis, r)))
    assert measured == pytest.approx(best_by_descent(c, m, r), rel=1e-4)
    assert measured == pytest.approx(float(basis.energy[r:].sum()), rel=1e-4)
    assert measured < 0.999 * float(error(c, m, keep(pca(c), r)))  # the metric matters


@given(st.integers(1, 3), st.integers(2, 12), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_balanced_in_every_shape(batch, d, seed):
    c, m = spd(batch, 2, d, seed=seed), spd(batch, 2, d, seed=seed + 1)
    basis = balanced(c, m)
    assert basis.encode.shape == basis.decode.shape == (batch, 2, d, d) and basis.energy.shape == (batch, 2, d)
    eye = torch.eye(d, dtype=torch.float64).expand(batch, 2, d, d)
    torch.testing.assert_close(keep(basis, d), eye, rtol=0, atol=1e-9)
    # balanced: both Gramians are the same diagonal, up to the ridge
    diagonal = torch.diag_embed(basis.energy.sqrt())
    torch.testing.assert_close(basis.encode.mT @ c @ basis.encode, diagonal, rtol=0, atol=1e-3)
    torch.testing.assert_close(basis.decode @ m @ basis.decode.mT, diagonal, rtol=0, atol=1e-3)
    errors = torch.stack([error(c, m, keep(basis, r)) for r in range(d + 1)])
    tails = torch.stack([basis.energy[..., r:].sum(-1) for r in range(d + 1)])
    torch.testing.assert_close(errors, tails, rtol=1e-3, atol=1e-4)
    assert (basis.energy.diff(dim=-1) <= 1e-12).all()
    torch.testing.assert_close(basis.condition, torch.linalg.cond(basis.encode))
    one = basis[batch - 1, 1]
    alone = balanced(c[batch - 1, 1], m[batch - 1, 1])
    torch.testing.assert_close(keep(one, d // 2), keep(alone, d // 2))


def test_energy_is_the_loss_on_samples():
    """Of vectors, not of covariances: queries q reading keys k lose ``E (q.k - q.k_r)^2``."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4000, 8, generator=generator, dtype=torch.float64) @ spd(8, seed=3)
    queries = torch.randn(4000, 8, generator=generator, dtype=torch.float64) @ spd(8, seed=4)
    basis = balanced(keys.mT @ keys / 4000, queries.mT @ queries / 4000)
    for r in (2, 4, 6):
        lost = (queries @ (keys - keys @ keep(basis, r)).mT).square().mean()
        assert float(lost) == pytest.approx(float(basis.energy[r:].sum()), rel=1e-3)


def test_bases_are_nested():
    """Keeping r of the coordinates kept by a larger rank is keeping r."""
    basis = balanced(spd(8, seed=5), spd(8, seed=6))
    for small, large in ((2, 5), (3, 4), (7, 8)):
        torch.testing.assert_close(keep(basis, large) @ keep(basis, small), keep(basis, small))
        torch.testing.assert_close(keep(basis, small) @ keep(basis, large), keep(basis, small))


def test_pca_is_balanced_with_the_identity():
    c = spd(3, 9, seed=7)
    basis, other = pca(c), balanced(c, torch.eye(9).expand(3, 9, 9))
    for r in range(1, 10):
        torch.testing.assert_close(keep(basis, r), keep(other, r), rtol=0, atol=1e-4)
    torch.testing.assert_close(basis.encode.norm(dim=-2), torch.ones(3, 9, dtype=torch.float64))
    assert torch.equal(basis.decode, basis.encode.mT)
    assert torch.equal(basis.condition, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(basis.energy, torch.linalg.eigvalsh(c).flip(-1))
    torch.testing.assert_close(basis.energy, other.energy, rtol=1e-3, atol=1e-6)


def singular(kind: str, seed: int) -> torch.Tensor:
    d = 8
    x = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :] = {"zero": 0 * x, "rank-one": x[:1].expand(d, d), "rank-four": x[:4].repeat(2, 1), "full": x}[kind]
    return x.mT @ x


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("metric", ["zero", "rank-one", "rank-four", "full"])
@pytest.mark.parametrize("covariance", ["zero", "rank-one", "rank-four", "full"])
def test_singular_statistics_give_exact_inverses(covariance, metric, scale):
    c, m = singular(covariance, 0) * scale, singular(metric, 1) / scale
    for basis in (balanced(c, m), pca(c), balanced(c.float(), m.float())):
        for tensor in (basis.encode, basis.decode, basis.energy, basis.condition):
            assert torch.isfinite(tensor).all()
        torch.testing.assert_close(keep(basis, 8), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
        inverse = torch.linalg.inv(basis.encode)
        torch.testing.assert_close(basis.decode, inverse, rtol=1e-4, atol=1e-6 * float(inverse.abs().max()))
        assert (basis.energy >= 0).all()


def test_a_direction_without_variance_goes_last():
    c = spd(6, seed=8)
    direction = torch.linalg.eigh(c)[1][:, 3]
    c = c - direction[:, None] * (direction @ c)
    c = (c + c.mT) / 2
    for basis in (pca(c), balanced(c, spd(6, seed=9))):
        assert basis.energy[5] < 1e-5 * basis.energy[0]
        assert float(error(c, torch.eye(6, dtype=c.dtype), keep(basis, 5))) < 1e-4


def test_bad_statistics_are_refused():
    good = torch.eye(4)
    for name, bad in (("covariance", (good * torch.nan, good)), ("metric", (good, good * torch.inf))):
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            balanced(*bad)
    with pytest.raises(ValueError, match="covariance holds NaN"):
        pca(good / 0)
    with pytest.raises(ValueError, match=r"must be \[..., d, d\], got \(4, 3\)"):
        pca(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="same shape"):
        balanced(good, torch.eye(5))
    with pytest.raises(ValueError, match="metric is not positive semi-definite"):
        balanced(good, -good)


# Rotations


def rotated(*shape: int, scale: float = 1.0, seed: int = 0) -> Cayley:
    module = Cayley(*shape)
    torch.manual_seed(seed)
    torch.nn.init.normal_(module.x, std=scale)
    return module


@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 24), st.floats(0.01, 2), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_cayley_is_a_rotation(batch, d, scale, seed):
    module = rotated(*batch, d, d, scale=scale, seed=seed)
    u = module()
    assert u.shape == (*batch, d, d) and u.dtype == torch.float32
    eye = torch.eye(d).expand_as(u)
    torch.testing.assert_close(u @ u.mT, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(u), torch.ones(batch), rtol=0, atol=1e-4)
    a = (module.x - module.x.mT) / 2
    torch.testing.assert_close(u, torch.linalg.inv(eye - a) @ (eye + a), rtol=0, atol=1e-4)


def test_cayley_starts_at_the_identity():
    module = Cayley(2, 3, 5, 5)
    assert torch.equal(module(), torch.eye(5).expand(2, 3, 5, 5))
    step = 1e-3 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    module.x.data += step
    torch.testing.assert_close(module() - torch.eye(5), step - step.mT, rtol=0, atol=5e-5)


def test_cayley_gradient():
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    module = Cayley(2, 4, 4).double()

    def by_module(x):
        return torch.func.functional_call(module, {"x": x})

    def by_series(x):  # another route: (I - A)^-1 (I + A) = 2 (I - A)^-1 - I
        a = (x - x.mT) / 2
        return 2 * torch.linalg.inv(torch.eye(4, dtype=x.dtype) - a) - torch.eye(4, dtype=x.dtype)

    assert torch.autograd.gradcheck(by_module, x)
    weight = torch.randn(2, 4, 4, dtype=torch.float64)
    ours, reference = (torch.autograd.grad((weight * f(x)).sum(), x)[0] for f in (by_module, by_series))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_cayley_ignores_autocast():
    module = rotated(6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, module())


def test_cayley_needs_squares():
    for shape in ((3,), (3, 4), ()):
        with pytest.raises(ValueError, match="square"):
            Cayley(*shape)


def test_a_rotated_basis_is_exact_and_keeps_the_span():
    basis = balanced(spd(2, 6, seed=10), spd(2, 6, seed=11))
    rotation = torch.eye(6).repeat(2, 1, 1)
    rotation[:, :3, :3] = rotated(2, 3, 3)().detach()  # among the first three coordinates
    turned = basis.rotated(rotation)
    eye = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(keep(turned, 6), eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(keep(turned, 3), keep(basis, 3), rtol=0, atol=1e-5)
    assert not torch.allclose(keep(turned, 2), keep(basis, 2), atol=1e-2)
    assert turned.encode.dtype == torch.float64
