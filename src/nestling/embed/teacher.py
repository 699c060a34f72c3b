"""A teacher outside of the model: embeddings of the training texts, cached in a table, found by row numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def checked_teacher(table: Tensor | np.ndarray) -> Tensor:
    """The table ``[N, D]``; one that is mapped from a file stays there.

    Raises:
        ValueError: it is of another shape, or not of floats.
    """
    teacher = torch.as_tensor(table)
    if teacher.ndim != 2 or not teacher.is_floating_point():
        raise ValueError(f"expected teacher embeddings [N, D] of floats, got {teacher.dtype} {list(teacher.shape)}")
    return teacher


def rows_of(teacher: Tensor, labels: Tensor | None, columns: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's unit vectors of the texts of a batch, ``[B, D]`` for each column, where the columns are.

    Args:
        teacher: ``[N, D]``, on any device.
        labels: row numbers ``[B, columns]``.
        columns: the student's vectors ``[B, d]`` of each column.

    Raises:
        ValueError: labels are missing, of another shape, or name rows that are not there.
    """
    shape = [len(columns[0]), len(columns)]
    if labels is None or labels.is_floating_point() or list(labels.shape) != shape:
        got = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(
            f"with a teacher, labels are the numbers of its rows: expected integers of shape {shape} "
            f"(texts, columns), got {got}"
        )
    numbers = labels.to(teacher.device)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(teacher):
        raise ValueError(f"labels name rows {low} to {high} of a teacher that has {len(teacher)}")
    return list(normalize(teacher[numbers.T].to(columns[0].device).float(), dim=-1))
