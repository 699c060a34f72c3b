"""Cross-entropy over a vocabulary, in chunks of positions, for an output matrix that is trained.

`nestling.losses.head_loss` does the same for a head that is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nestling.errors import OptionError

LOGITS = 2**25  # numbers that a chunk has: 128 MiB of fp32


class Entropies(NamedTuple):
    """``loss`` is the weighted sum and has a gradient; ``each`` ``[N]`` are the positions' own, detached, in nats."""

    loss: Tensor
    each: Tensor


def cross_entropies(
    states: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, chunk: int | None = None
) -> Entropies:
    """``sum_i weights_i * CE(states_i @ matrix^T + bias, labels_i)``.

    The gradients are taken chunk by chunk while the logits of that chunk exist, so those of all positions never do;
    nothing is computed twice. Products are in autocast's dtype, softmax and sums in fp32.

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
    chunk = chunk or max(1, LOGITS // len(matrix))
    return Entropies(*_Entropies.apply(states, matrix, bias, labels, weights, chunk))


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, matrix, bias, labels, weights, chunk):
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype
        by_states, by_matrix, by_bias = ctx.needs_input_grad[:3]
        gradients = [
            torch.empty_like(states, dtype=dtype) if by_states else None,
            torch.zeros_like(matrix) if by_matrix else None,
            torch.zeros_like(bias) if by_bias else None,
        ]
        each = torch.empty(len(states), dtype=torch.promote_types(dtype, torch.float32), device=states.device)
        with torch.autocast(kind, enabled=False):
            output = matrix.to(dtype), None if bias is None else bias.to(dtype)
            inputs = states.to(dtype)
            for start in range(0, len(states), chunk):
                part = slice(start, start + chunk)
                logits = linear(inputs[part], *output).to(each.dtype)
                each[part] = _to_probabilities(logits, labels[part])
                if not any(ctx.needs_input_grad):
                    continue
                _to_gradient(logits, labels[part], weights[part])
                if gradients[2] is not None:
                    gradients[2].add_(logits.sum(0))
                _add(gradients[:2], part, inputs[part], logits.to(dtype), output[0])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(each)
        ctx.dtype = states.dtype
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx, by_loss, _):
        states, matrix, bias = (None if g is None else g * by_loss.to(g.dtype) for g in ctx.saved_tensors)
        return None if states is None else states.to(ctx.dtype), matrix, bias, None, None, None


def _to_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The entropies of a chunk; in the place of its logits are probabilities then. One buffer, no copies."""
    logits.sub_(logits.amax(-1, keepdim=True))
    true = logits.gather(-1, labels[:, None])[:, 0]
    total = logits.exp_().sum(-1)
    logits.div_(total[:, None])
    return total.log() - true


def _to_gradient(probabilities: Tensor, labels: Tensor, weights: Tensor) -> None:
    """By the logits, in the place of the probabilities: ``weights * (p - onehot)``."""
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    probabilities.mul_(weights[:, None].to(probabilities.dtype))


def _add(gradients: list[Tensor | None], part: slice, inputs: Tensor, by_logits: Tensor, matrix: Tensor) -> None:
    by_states, by_matrix = gradients
    if by_states is not None:
        by_states[part] = by_logits @ matrix
    if by_matrix is not None and by_matrix.dtype == by_logits.dtype:
        by_matrix.addmm_(by_logits.mT, inputs)
    elif by_matrix is not None:
        by_matrix.add_(by_logits.mT @ inputs)
