"""How a model compares vectors: by cosine, or by a dot product or a distance, in which their lengths count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SimilarityFunction
from sentence_transformers.base.modules import Normalize
from torch import Tensor
from torch.nn.functional import normalize

from nestling.errors import UnsupportedEncoderError

Vectors = np.ndarray | Tensor
WORDS = {
    "cosine": "cosine",
    "dot": "dot product",
    "euclidean": "Euclidean distance",
    "manhattan": "Manhattan distance",
}


@dataclass(frozen=True)
class Similarity:
    """A model's own similarity. Make it with `of`.

    Attributes:
        name: ``"cosine"``, ``"dot"``, ``"euclidean"`` or ``"manhattan"``, as sentence-transformers calls it.
        unit: whether vectors are brought to unit length behind the cut: for cosines, and where the model does so.
    """

    name: str = "cosine"
    unit: bool = True

    @classmethod
    def of(cls, model: SentenceTransformer) -> Similarity:
        """That of a model.

        Raises:
            UnsupportedEncoderError: its vectors are brought to unit length first and cut then, by its
                ``truncate_dim``, and the lengths that are left count.
        """
        name = model.similarity_fn_name
        normalised = isinstance(list(model.children())[-1], Normalize)
        if name != "cosine" and normalised and model.truncate_dim is not None:
            raise UnsupportedEncoderError(
                f"the model compares by {name}, normalises its vectors and then cuts them to "
                f"truncate_dim={model.truncate_dim}, which no size of it does: leave truncate_dim out"
            )
        return cls(name, name == "cosine" or normalised)

    @property
    def words(self) -> str:
        """As a sentence has it."""
        return WORDS[self.name]

    def finished(self, vectors: Tensor) -> Tensor:
        """Vectors ``[..., d]`` that were cut, as the model of that size gives them."""
        return normalize(vectors, dim=-1) if self.unit else vectors

    def pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """The similarity of each pair of finished vectors ``[n, d]``, ``[n]``."""
        return SimilarityFunction.to_similarity_pairwise_fn(self._name)(first, second)

    def scores(self, first: Tensor, second: Tensor) -> Tensor:
        """The similarities of finished vectors ``[n, d]`` and ``[m, d]``, ``[n, m]``."""
        return SimilarityFunction.to_similarity_fn(self._name)(first, second)

    @property
    def _name(self) -> str:
        """Unit vectors have their dot product for a cosine, which saves normalising them again."""
        return "dot" if self.name == "cosine" else self.name


COSINE = Similarity()


def joined(first: Vectors, second: Vectors) -> Vectors:
    """The sum of two sizes' vectors of the same texts, as wide as the second's, both and the sum of unit length.

    Args:
        first: ``[..., D]`` of the wider size.
        second: ``[..., d]``.
    """
    wide, narrow = torch.as_tensor(first), torch.as_tensor(second)
    both = normalize(normalize(wide[..., : narrow.shape[-1]], dim=-1) + normalize(narrow, dim=-1), dim=-1)
    return both if isinstance(first, Tensor) else both.numpy()
