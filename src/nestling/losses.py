"""Distances between a model at full size and at a smaller one, over vocabularies and over texts of a batch; and losses
through an output head, in chunks of positions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, nll_loss

from nestling.errors import OptionError

IGNORED = -100  # label of positions that have no next token or are not to be learned, as in transformers
LOGITS = 2**25  # numbers in a chunk of logits: 128 MiB of fp32


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

    The head is not trained: it gets no gradient.

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
    counted = (labels != IGNORED).sum().clamp_min(1)
    wide = torch.promote_types(student.dtype, torch.float32)
    weights = torch.full(labels.shape, ce_weight, dtype=wide, device=labels.device) / counted
    loss, kl, ce = _ThroughHead.apply(
        student, teacher.detach(), labels, weights, kl_weight / max(1, len(student)), head, chunk
    )
    return HeadLoss(loss, kl.mean(), ce.sum() / counted)


class Entropies(NamedTuple):
    """``loss`` is the weighted sum and has a gradient; ``each`` ``[N]`` are the positions' own, detached, in nats."""

    loss: Tensor
    each: Tensor


def cross_entropies(
    states: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, chunk: int | None = None
) -> Entropies:
    """``sum_i weights_i * CE(states_i @ matrix^T + bias, labels_i)``, in chunks of positions, with an output matrix
    that is trained. Products are in autocast's dtype, softmax and sums in fp32.

    Args:
        states: ``[N, H]``, what the output matrix is applied to.
        matrix, bias: ``[V, H]`` and ``[V]``.
        labels: ``[N]`` int64, each from 0 to V - 1.
        weights: ``[N]``, constants.
        chunk: positions whose logits exist at a time; by default as many as have `LOGITS` logits.
    """
    if states.ndim != 2 or labels.shape != states.shape[:1] or weights.shape != labels.shape:
        shapes = [list(t.shape) for t in (states, labels, weights)]
        raise OptionError(f"expected states [N, H], labels [N] and weights [N], got {shapes}")
    parameters = (matrix,) if bias is None else (matrix, bias)
    chunk = chunk or max(1, LOGITS // len(matrix))
    loss, _, each = _ThroughHead.apply(states, None, labels, weights, 0.0, linear, chunk, *parameters)
    return Entropies(loss, each)


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


def similarity_kl(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over queries of ``KL(softmax(teacher rows / T) || softmax(student rows / T))``, a scalar in nats.

    The two may have different widths: only their rankings meet. This is the distillation of arXiv 2410.13230 as its
    retrieval models are trained, without a factor T^2.
    """
    return kl_divergence(similarity_rows(teacher) / temperature, similarity_rows(student) / temperature).mean()


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _ThroughHead(torch.autograd.Function):
    """``kl_weight * sum_i KL_i + sum_i weights_i * CE_i``, and both ``[N]`` without gradients.

    Neither the logits of all positions nor their gradient ever exist: the gradients of each chunk, by its states and
    by the head's parameters, are taken at once, and those are kept.
    """

    @staticmethod
    def forward(ctx, states, teacher, labels, weights, kl_weight, head, chunk, *parameters):
        asked = (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])
        inputs = [x.detach().requires_grad_(needed) for x, needed in zip((states, *parameters), asked, strict=True)]
        kept = [torch.zeros_like(x) if x.requires_grad else None for x in inputs]
        weights = weights.masked_fill(labels == IGNORED, 0)
        parts = []
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            leaves = [inputs[0][rows].detach().requires_grad_(asked[0]), *inputs[1:]]
            with torch.set_grad_enabled(any(asked)):
                logits = head(*leaves)
            expected = None if teacher is None else _log_softmax(head(teacher[rows], *parameters))
            kl, ce, by_logits = _chunk(logits.detach(), expected, labels[rows], weights[rows], kl_weight)
            if any(asked):
                wanted = [x for x in leaves if x.requires_grad]
                _add(kept, rows, torch.autograd.grad(logits, wanted, by_logits))
            parts.append(torch.stack((kl, ce)))
        ctx.save_for_backward(*kept)
        kl, ce = torch.cat(parts, 1) if parts else states.new_zeros((2, 0))
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl.sum() + (ce * weights).sum(), kl, ce

    @staticmethod
    def backward(ctx, by_loss, *_):
        states, *parameters = (None if x is None else x * by_loss.to(x.dtype) for x in ctx.saved_tensors)
        return states, None, None, None, None, None, None, *parameters


def _chunk(logits: Tensor, log_q: Tensor | None, labels: Tensor, weights: Tensor, kl_weight: float):
    """KL and CE of positions ``[n]``, and the gradient of the loss by their logits ``[n, V]``.

    That is ``kl_weight * (p - q) + weights * (p - onehot)``, put together in the place of ``log_p``.
    """
    log_p = _log_softmax(logits)
    ce = nll_loss(log_p, labels, ignore_index=IGNORED, reduction="none")
    kl = torch.zeros_like(ce) if log_q is None else (log_q.exp() * (log_q - log_p)).sum(-1)
    by_logits = log_p.exp_().mul_((weights if log_q is None else weights + kl_weight)[:, None])
    by_logits.scatter_add_(1, labels.clamp_min(0)[:, None], -weights[:, None].to(by_logits.dtype))
    if log_q is not None:
        by_logits.sub_(log_q.exp_(), alpha=kl_weight)
    return kl, ce, by_logits.to(logits.dtype)


def _add(kept: list[Tensor | None], rows: slice, gradients: Sequence[Tensor]) -> None:
    """The gradients of a chunk to those of the chunks before it: of ``rows`` of the states, and of all parameters."""
    first, *others = kept
    left = list(gradients)
    if first is not None:
        first[rows] = left.pop(0)
    for total, gradient in zip([x for x in others if x is not None], left, strict=True):
        total += gradient
