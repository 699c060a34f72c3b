"""Distances between a model at full size and at a smaller one. Shared by both wings."""

import torch
from torch import Tensor


def kl_divergence(teacher: Tensor, student: Tensor, chunk: int = 128) -> Tensor:
    """KL(teacher || student) per position in nats, ``[N]`` fp32, from logits ``[N, V]``.

    Computed in log space (no 0 * -inf) and in chunks of positions, so that no fp32 copy of all logits is made.
    """
    if teacher.shape != student.shape or teacher.ndim != 2:
        raise ValueError(f"logits must both be [N, V], got {list(teacher.shape)} and {list(student.shape)}")
    out = []
    for t, s in zip(teacher.split(chunk), student.split(chunk), strict=True):
        t, s = t.float().log_softmax(-1), s.float().log_softmax(-1)
        out.append((t.exp() * (t - s)).sum(-1))
    return torch.cat(out) if out else teacher.new_zeros(0, dtype=torch.float32)
