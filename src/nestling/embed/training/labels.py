"""Labels that a loss cannot use: a wrong kind of number is no error to most losses, they learn nonsense from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers.sentence_transformer import losses
from torch import nn

from nestling.embed.training.loss import StarbucksLoss
from nestling.errors import ExampleError

BLIND = (
    losses.MultipleNegativesRankingLoss,
    losses.CachedMultipleNegativesRankingLoss,
    losses.MultipleNegativesSymmetricRankingLoss,
    losses.CachedMultipleNegativesSymmetricRankingLoss,
    losses.TripletLoss,
    losses.GlobalOrthogonalRegularizationLoss,
)
CONTRASTIVE = (losses.ContrastiveLoss, losses.OnlineContrastiveLoss)
GROUPED = (
    losses.BatchAllTripletLoss,
    losses.BatchHardTripletLoss,
    losses.BatchSemiHardTripletLoss,
    losses.BatchHardSoftMarginTripletLoss,
)
KINDS: tuple[tuple[tuple[type, ...], str, Callable[[Any], bool]], ...] = (
    (CONTRASTIVE, "0 (another meaning) or 1 (the same)", lambda label: label in (0, 1)),
    ((losses.CosineSimilarityLoss,), "a cosine, from -1 to 1", lambda label: _is_number(label) and -1 <= label <= 1),
    (GROUPED, "an integer, the group of its text", lambda label: isinstance(label, int)),
)


def check_labels(loss: nn.Module | None, labels: list[Any] | None) -> None:
    """Look at the labels with the eyes of the innermost loss. Those of losses that are not named here may be anything.

    Args:
        loss: a base loss, or one that is wrapped, as in a `StarbucksLoss`.
        labels: one for each row, finite numbers or lists of such; None if there are none.

    Raises:
        ValueError: the loss does not read labels, or one is not of its kind (the row is named).
    """
    while isinstance(loss, nn.Module) and isinstance(getattr(loss, "loss", None), nn.Module):
        if isinstance(loss, StarbucksLoss) and loss.teacher is not None:
            return  # labels are rows of the teacher, which it checks itself
        loss = loss.loss  # type: ignore[assignment]
    if labels is None:
        return
    name = type(loss).__name__
    if isinstance(loss, BLIND):
        raise ExampleError(
            f"{name} takes every row as a good one and reads no labels, and these rows have some, such as "
            f"{labels[0]!r}: use CoSENTLoss for scores, or leave the labels out"
        )
    for kinds, expected, fits in KINDS:
        bad = next((i for i, label in enumerate(labels) if isinstance(loss, kinds) and not fits(label)), None)
        if bad is not None:
            raise ExampleError(f"row {bad + 1}: {name} cannot use the label {labels[bad]!r}: expected {expected}")


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float)
