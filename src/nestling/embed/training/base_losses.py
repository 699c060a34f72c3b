"""The losses that can be taken at several sizes of one embedding, how each gives its value, and if it reads labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from nestling.errors import ExampleError, OptionError
from nestling.options import shown

Value = Tensor | dict[str, Tensor]  # some losses return named parts
BLIND = (
    losses.MultipleNegativesRankingLoss,
    losses.CachedMultipleNegativesRankingLoss,
    losses.MultipleNegativesSymmetricRankingLoss,
    losses.CachedMultipleNegativesSymmetricRankingLoss,
    losses.TripletLoss,
    losses.GlobalOrthogonalRegularizationLoss,
)  # losses without labels
Batches = list[list[Tensor]]  # for each column of texts, vectors [b, d] of its mini-batches


def made(loss: Any, model: SentenceTransformer) -> nn.Module | None:
    """The loss that was asked for: a module, or something that makes one of the model.

    Args:
        loss: a module; a class or a function of the model; the name of a class of sentence-transformers; a dict of one
            of these; or None.

    Raises:
        OptionError: it is none of these, or cannot be made of the model alone.
    """
    if loss is None or isinstance(loss, nn.Module):
        return loss
    if isinstance(loss, Mapping):
        if len(loss) != 1:
            raise OptionError(f"loss={shown(loss)}: there is one set of rows, which takes one loss, not {len(loss)}")
        return made(next(iter(loss.values())), model)
    maker = _named(loss) if isinstance(loss, str) else loss
    if not callable(maker):
        raise OptionError(f"loss={shown(loss)}: expected a loss, its class or its name, or a function of the model")
    name = getattr(maker, "__name__", type(maker).__name__)
    try:
        found = maker(model)
    except Exception as error:
        raise OptionError(f"loss: {name}(model) cannot be made ({error}): give the loss itself") from error
    if not isinstance(found, nn.Module):
        raise OptionError(f"loss: {name}(model) made {shown(found)}, which is no loss")
    return found


def _named(name: str) -> Any:
    known = {key: kind for key, kind in vars(losses).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if name not in known:
        near = ", ".join(get_close_matches(name, known, 3, 0.4)) or "MultipleNegativesRankingLoss"
        raise OptionError(f"loss={shown(name)}: sentence-transformers has no loss of that name, but {near}")
    return known[name]


def caches_gradients(loss: nn.Module) -> bool:
    """Whether a loss of sentence-transformers caches gradients; any other one must take embeddings.

    Raises:
        ValueError: it can only be taken of embeddings that it makes itself.
    """
    if isinstance(loss, losses.EmbedDistillLoss):
        raise OptionError(
            "EmbedDistillLoss compares coordinates with those of another model, which small sizes do not have: give "
            "train that model as its teacher"
        )
    cached = uses_gradient_cache(loss)
    if cached and isinstance(loss, CachedLossMixin):
        return True
    if cached or not hasattr(loss, "compute_loss_from_embeddings"):
        raise OptionError(
            f"{type(loss).__name__} embeds texts by itself, so it cannot be taken at several sizes of one embedding: "
            "expected a loss with compute_loss_from_embeddings, such as MultipleNegativesRankingLoss or CoSENTLoss, "
            "or CachedMultipleNegativesRankingLoss"
        )
    return False


def value(loss: Any, embeddings: Sequence[Tensor], labels: Tensor | None) -> Value:
    """The loss of vectors ``[B, d]``, one per column of texts, cut to the size in question.

    Raises:
        ValueError: the loss needs labels and there are none, or they are of another number or shape.
    """
    if labels is not None and labels.shape[:1] != embeddings[0].shape[:1]:
        raise ExampleError(f"expected labels for {len(embeddings[0])} texts, got labels {list(labels.shape)}")
    try:
        return loss.compute_loss_from_embeddings(list(embeddings), labels)
    except (AttributeError, TypeError) as error:
        if labels is not None:
            raise
        raise ExampleError(
            f"{type(loss).__name__} needs labels and there are none: give the data a column named label or score, or "
            "choose a loss without labels (those of a StarbucksLoss with a teacher are the teacher's)"
        ) from error


def cached_value(loss: Any, batches: Batches, labels: Tensor | None, weight: float, with_backward: bool) -> Tensor:
    """The loss of vectors ``[b, d]`` of mini-batches.

    With ``with_backward``, ``weight`` times its gradient is sent through the vectors. A loss that caches gradients
    back-propagates by itself, into leaves: they are put between it and the vectors.
    """
    if not with_backward:
        return loss.calculate_loss(batches, labels)
    leaves = [[vectors.detach().requires_grad_() for vectors in column] for column in batches]
    found = loss.calculate_loss(leaves, labels, with_backward=True)
    pairs = [
        pair for vectors, copies in zip(batches, leaves, strict=True) for pair in zip(vectors, copies, strict=True)
    ]
    used = [(vectors, weight * leaf.grad) for vectors, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([vectors for vectors, _ in used], [gradient for _, gradient in used])
    return found


def check_labels(loss: Any, labels: list[Any] | None) -> None:
    """Whether a loss reads the labels that there are: most of those that do not say nothing of it.

    Args:
        loss: a base loss, or one that is wrapped, as in a `StarbucksLoss`, whose teacher's rows are its labels.
        labels: one for each row; None if there are none.

    Raises:
        ExampleError: the innermost loss reads no labels.
    """
    while isinstance(getattr(loss, "loss", None), nn.Module):
        if getattr(loss, "teacher", None) is not None:
            return
        loss = loss.loss
    if labels is not None and isinstance(loss, BLIND):
        raise ExampleError(
            f"{type(loss).__name__} takes every row as a good one and reads no labels, and these rows have some, such "
            f"as {labels[0]!r}: use CoSENTLoss for scores, or leave the labels out"
        )
