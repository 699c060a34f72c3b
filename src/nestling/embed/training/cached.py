"""Gradient caching for losses that need more of a forward than one embedding; the wing's version seam for it.

A loss over large batches embeds them in small ones, twice: once to get the gradients by the embeddings, and once more
to send those on into the model (arXiv 2101.06983). sentence-transformers has the machinery for one embedding a text.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _create_minibatch
from torch import Tensor


class CachedRepresentation(CachedLossMixin):
    """The machinery with ``self.represent(features)["sentence_embedding"]`` in place of the model's embedding."""

    def represent(self, features: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Texts ``begin`` to ``end`` of a column; the second time with the random state of the first (dropout)."""
        features = _create_minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*features.values()) if copy_random_state else None
            return self.represent(features)["sentence_embedding"], state
