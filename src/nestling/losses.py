"""Distances between a model at full size and at a smaller one: over vocabularies, and over texts of a batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nestling.errors import OptionError

IGNORED = -100  # label of positions that have no next token or are not to be learned, as in transformers


def kl_divergence(teacher: Tensor, student: Tensor, chunk: int = 128) -> Tensor:
    """KL(teacher || student) per position in nats, ``[N]`` fp32, from logits ``[N, V]``.

    Computed in log space (no 0 * -inf) and in chunks of positions, so that no fp32 copy of all logits is made.
    """
    if teacher.shape != student.shape or teacher.ndim != 2:
        raise OptionError(f"logits must both be [N, V], got {list(teacher.shape)} and {list(student.shape)}")
    out = []
    for t, s in zip(teacher.split(chunk), student.split(chunk), strict=True):
        t, s = _log_softmax(t), _log_softmax(s)
        out.append((t.exp() * (t - s)).sum(-1))
    return torch.cat(out) if out else teacher.new_zeros(0, dtype=torch.float32)


class HeadLoss(NamedTuple):
    """``loss`` has a gradient; ``kl`` and ``ce`` are its detached parts, means in nats per position."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def head_loss(
    student: Tensor,
    teacher: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk: int = 256,
) -> HeadLoss:
    """``kl_weight * KL(teacher || student) + ce_weight * CE(labels)`` from last hidden states, in chunks of positions.

    Neither the logits of all positions nor their gradient ever exist: each chunk's gradient by its hidden states is
    taken at once, and those are kept. The head is not trained: it gets no gradient.

    Args:
        student, teacher: hidden states ``[N, H]``; no gradient goes to the teacher.
        head: hidden states ``[n, H]`` to logits ``[n, V]``.
        labels: next tokens ``[N]`` int64, `IGNORED` where there are none. The mean of CE is over the others.
        chunk: positions whose logits exist at a time.
    """
    if labels is None:
        labels = torch.full(student.shape[:1], IGNORED, device=student.device)
    if teacher.shape != student.shape or student.ndim != 2 or labels.shape != student.shape[:1]:
        shapes = [list(t.shape) for t in (student, teacher, labels)]
        raise OptionError(f"expected hidden states [N, H] twice and labels [N], got {shapes}")
    loss, kl, ce = _HeadLoss.apply(student, teacher.detach(), labels, head, kl_weight, ce_weight, chunk)
    return HeadLoss(loss, kl, ce)


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


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, head, kl_weight, ce_weight, chunk):
        differentiate = ctx.needs_input_grad[0]
        counted = (labels != IGNORED).sum().clamp_min(1)
        totals = torch.zeros(2, dtype=torch.float64, device=student.device)
        gradients = []
        for s, t, y in zip(student.split(chunk), teacher.split(chunk), labels.split(chunk), strict=True):
            with torch.no_grad():
                expected = _log_softmax(head(t))
            with torch.set_grad_enabled(differentiate):
                s = s.detach().requires_grad_(differentiate)
                log_p = _log_softmax(head(s))
                kl = (expected.exp() * (expected - log_p)).sum() / len(student)
                ce = cross_entropy(log_p, y, ignore_index=IGNORED, reduction="sum") / counted
                loss = kl_weight * kl + ce_weight * ce
            if differentiate:
                gradients.append(torch.autograd.grad(loss, s)[0])
            totals += torch.stack((kl.detach(), ce.detach())).double()
        ctx.save_for_backward(*([torch.cat(gradients)] if differentiate else []))
        kl, ce = totals.to(torch.promote_types(student.dtype, torch.float32))
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, by_loss, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * by_loss, None, None, None, None, None, None
