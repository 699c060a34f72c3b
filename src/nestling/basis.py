"""Nested bases: invertible changes of coordinates whose first r coordinates are the best r to keep.

Row vectors throughout: ``coordinates = x @ encode`` and ``x = coordinates @ decode`` with ``decode = encode^-1``.
Keeping r coordinates replaces x by ``x @ encode[:, :r] @ decode[:r]``; because the bases are nested, one basis serves
every r. Shared by both wings (keys and values of a cache, pooled vectors of an encoder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.errors import CalibrationError, OptionError

RIDGE = 1e-6  # of the mean eigenvalue, added to the diagonal: singular statistics stay invertible


@dataclass(frozen=True)
class NestedBasis:
    """A batch of nested bases.

    Attributes:
        encode: ``[..., d, d]`` fp64, x to coordinates, most valuable coordinate first.
        decode: ``[..., d, d]`` fp64, the inverse of ``encode``.
        energy: ``[..., d]`` fp64, the loss expected from dropping each coordinate, largest first as made, in the unit
            of the metric (``E ||x - x E_r D_r||^2_M = energy[r:].sum()``, up to the ridge).
        condition: ``[...]`` fp64, the 2-norm condition number of ``encode`` (1 for an orthogonal basis). Oblique
            bases with a large one amplify rounding in stored coordinates.
    """

    encode: Tensor
    decode: Tensor
    energy: Tensor
    condition: Tensor

    def __getitem__(self, index) -> NestedBasis:
        return NestedBasis(self.encode[index], self.decode[index], self.energy[index], self.condition[index])

    def rotated(self, rotation: Tensor) -> NestedBasis:
        """The basis with an orthogonal ``rotation`` ``[..., d, d]`` on top: still exact at full size.

        The energies are those of the unrotated basis; after training they have to be measured again.
        """
        encode, decode = self.encode @ rotation.to(self.encode), rotation.mT.to(self.decode) @ self.decode
        return NestedBasis(encode, decode, self.energy, self.condition)


def balanced(covariance: Tensor, metric: Tensor, ridge: float = RIDGE) -> NestedBasis:
    """The nested basis that is optimal for vectors of second moment C when errors are weighed by a metric M.

    Minimises ``E ||(x - x E_r D_r)||^2_M = tr((I - P) ^T C (I - P) M)`` over all rank-r linear maps P, for every r at
    once: with C = Lc Lc^T, M = Lm Lm^T and svd(Lc^T Lm) = A S B^T,

        encode = Lc^-T A S^1/2,   decode = S^-1/2 A^T Lc^T,   energy = S^2.

    In these coordinates ``encode^T C encode = decode M decode^T = S``: the balanced realisation of control theory; for
    keys and queries it is KQ-SVD (arXiv 2512.05916).

    Args:
        covariance: ``[..., d, d]`` symmetric positive semi-definite second moment of the vectors.
        metric: ``[..., d, d]`` symmetric positive semi-definite weight of the error.
        ridge: multiple of the mean eigenvalue that is added to both diagonals.

    Raises:
        OptionError: if the shapes differ or an entry is not finite.
    """
    lc, lm = _factor(covariance, "covariance", ridge), _factor(metric, "metric", ridge)
    if lc.shape != lm.shape:
        raise OptionError(f"covariance {tuple(lc.shape)} and metric {tuple(lm.shape)} must have the same shape")
    a, s, _ = torch.linalg.svd(lc.mT @ lm)
    root = s.clamp_min(s[..., :1] * 1e-12).sqrt()
    encode = torch.linalg.solve_triangular(lc.mT, a, upper=True) * root[..., None, :]
    decode = (a.mT @ lc.mT) / root[..., :, None]
    return NestedBasis(encode, decode, s.square(), torch.linalg.cond(encode))


def pca(covariance: Tensor) -> NestedBasis:
    """Principal components: the balanced basis of the identity metric, with unit columns (decode = encode^T).

    Args:
        covariance: ``[..., d, d]`` symmetric positive semi-definite.

    Raises:
        OptionError: if an entry is not finite or the matrices are not square.
    """
    values, vectors = torch.linalg.eigh(_symmetric(covariance, "covariance"))
    encode, energy = vectors.flip(-1), values.flip(-1).clamp_min(0)
    return NestedBasis(encode, encode.mT, energy, torch.ones_like(energy[..., 0]))


class Cayley(nn.Module):
    """Trainable rotations ``U = (I - A)^-1 (I + A)`` with ``A = (X - X^T) / 2``, one for each leading index.

    X starts at zero, where U is the identity and dU/dX = X - X^T: a trained basis starts from the basis below it and
    stays exactly invertible for every X (arXiv 2410.14731, section 3.2, without its inverse Cayley start).
    Everything is computed in fp32, whatever autocast says.
    """

    def __init__(self, *shape: int):
        """``shape`` is ``(..., d, d)``."""
        super().__init__()
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise OptionError(f"a rotation is square, got shape {shape}")
        self.x = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        """The rotations, ``[..., d, d]``, in the dtype of ``x``."""
        with torch.autocast(self.x.device.type, enabled=False):
            a = (self.x - self.x.mT) / 2
            eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            return torch.linalg.solve(eye - a, eye + a)


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise OptionError(f"{name} must be [..., d, d], got {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise CalibrationError(f"{name} holds NaN or infinite entries")
    matrix = matrix.double()
    return (matrix + matrix.mT) / 2


def _factor(matrix: Tensor, name: str, ridge: float) -> Tensor:
    """Lower Cholesky factor of the regularised matrix; an all-zero matrix becomes a multiple of the identity."""
    matrix = _symmetric(matrix, name)
    d = matrix.shape[-1]
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    eye = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
    for attempt in range(6):  # rounding can leave eigenvalues below zero by more than the ridge
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * 10**attempt * scale[..., None, None] * eye)
        if not info.any():
            return factor
    raise CalibrationError(f"{name} is not positive semi-definite")
