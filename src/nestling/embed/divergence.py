"""How far a small cup is from its teacher, within one batch. Both see vectors ``[B, d]``, one per column of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.distill import kl_divergence


def similarity_rows(columns: Sequence[Tensor]) -> Tensor:
    """Scores of each query over the texts of the batch: what retrieval ranks by.

    Args:
        columns: vectors ``[B, d]``; the first column holds the queries, all the others are ranked. A column alone is
            ranked against itself, without each text's own score.

    Returns:
        ``[B, B * (columns - 1)]``, or ``[B, B - 1]``.
    """
    queries, *others = columns
    if others:
        return queries @ torch.cat(others).mT
    others_only = ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    return (queries @ queries.mT)[others_only].view(len(queries), -1)


def similarity_kl(
    teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over queries of ``KL(softmax(teacher rows / T') || softmax(student rows / T))``, a scalar in nats.

    The two may have different widths: only their rankings meet. This is the distillation of arXiv 2410.13230 as its
    retrieval models are trained, without a factor T^2.
    """
    teacher_rows, student_rows = similarity_rows(teacher), similarity_rows(student)
    return kl_divergence(teacher_rows / teacher_temperature, student_rows / temperature).mean()


def coordinate_kl(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over all texts of the KL between softmaxes over the **coordinates** of their vectors, a scalar in nats.

    The teacher's vectors are cut to the student's width. Coordinates are no distribution over anything; this is what
    the released code of arXiv 2410.13230 does for STS, kept for comparison.
    """
    student_rows = torch.cat(list(student))
    teacher_rows = torch.cat(list(teacher))[:, : student_rows.shape[1]]
    return kl_divergence(teacher_rows / temperature, student_rows / temperature).mean()
