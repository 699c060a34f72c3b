"""Products of a decode step, in the precision that the device is fast at and with few, small operations."""

import torch
from torch import Tensor

SMALL_PRODUCT = 2**16  # multiplications up to which a product is done without matmul on several CPU threads


def work_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products: CPUs are slow at 16 bits, up to 20 times, so at least fp32 there."""
    if dtype == torch.float32 or device.type != "cpu":
        return dtype
    return torch.promote_types(dtype, torch.float32)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, at no cost where there is nothing to do: a decode step asks hundreds of times."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for ``[n, a, b]`` and ``[n, b, c]``.

    A small product on several CPU threads goes without matmul, which takes longer to wake them: with two threads and
    ``OMP_WAIT_POLICY=passive`` a batched matmul takes 0.1 ms or more, and a decode step has hundreds.
    """
    return _elementwise(left, right) if _small(left, right) else torch.bmm(left, right)


def product_onto(base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``beta * base + alpha * left @ right``, as one operation; ``base`` is broadcast."""
    if _small(left, right):
        return torch.add(base * beta, _elementwise(left, right), alpha=alpha)
    return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> None:
    """``out = beta * out + alpha * left @ right`` in place, whatever ``out`` holds if ``beta`` is zero.

    ``out`` must be contiguous (heads of a layer are): into any other a batched matmul goes one by one.
    """
    if not _small(left, right):
        out.baddbmm_(left, right, beta=beta, alpha=alpha)
    elif beta:
        out.mul_(beta).add_(_elementwise(left, right), alpha=alpha)
    else:
        out.copy_(_elementwise(left, right).mul_(alpha))


def _small(left: Tensor, right: Tensor) -> bool:
    if torch.get_num_threads() == 1 or left.device.type != "cpu":
        return False
    return left.numel() * right.shape[-1] <= SMALL_PRODUCT


def _elementwise(left: Tensor, right: Tensor) -> Tensor:
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def softmax(score: Tensor) -> Tensor:
    """Attention weights over the last axis, in fp32 at least."""
    if score.dtype == torch.float32:
        return score.softmax(-1)
    return score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(score.dtype)
