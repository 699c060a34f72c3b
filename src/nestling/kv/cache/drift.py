"""How the mean of keys moves with their position: in spans of positions, each with a mean of its own.

Keys turn with their position (RoPE). Of most coordinates the mean over some hundred positions is the same anywhere,
but some turn so slowly that the mean of the first thousand tokens is wrong a thousand tokens later. A cache that does
not store such a coordinate takes it to be at the mean of its span, which adds one number to the logits of all tokens
of a span. Nothing is stored for it, and it does not matter how a text was read. Spans begin behind the sinks.
"""

import torch
from torch import Tensor

SPAN = 256  # positions


def span_of(positions: Tensor, spans: int) -> Tensor:
    """The span that each position is in; the last one of ``spans`` is for all that come later."""
    return (positions // SPAN).clamp_(max=spans - 1)


def span_count(tokens: int, spans: int) -> int:
    """How many of ``spans`` so many tokens in a row lie in."""
    return min(-(-tokens // SPAN), spans)


def add_by_span(logits: Tensor, drift: Tensor) -> None:
    """Add to logits ``[..., T]`` of tokens in a row, in place, what their spans have, ``[..., spans]``."""
    count, spans = logits.shape[-1], drift.shape[-1]
    whole = min(count // SPAN, spans - 1)
    if whole:
        part = logits[..., : whole * SPAN]
        part.unflatten(-1, (whole, SPAN)).add_(drift[..., :whole, None])
    logits[..., whole * SPAN :].add_(drift[..., whole : whole + 1])


class Means:
    """The means of keys and values at any position, fp32.

    Args:
        mean: ``[2, L, Hkv, D]``, of keys and of values.
        drift: by how much those of keys differ in each span, ``[L, Hkv, spans, D]``; None where they do not.
    """

    def __init__(self, mean: Tensor, drift: Tensor | None):
        self.mean, self.drift = mean, drift

    def by_span(self, side: int, row: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``[Hkv, spans, D]`` of keys (side 0) or values (side 1), and the span of each position."""
        mean = self.mean[side, row][:, None].to(positions.device)
        if side == 1 or self.drift is None:
            return mean, torch.zeros_like(positions)
        drift = self.drift[row].to(positions.device)
        return mean + drift, span_of(positions, drift.shape[1])
