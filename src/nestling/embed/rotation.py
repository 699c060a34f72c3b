"""A start for prefixes: the pooled vector of each depth in its principal components, the largest first.

An orthogonal change of basis changes no similarity at full width, and can be folded into the linear map that cuts an
exported model to its width. Centring does change similarities: a common component of all vectors is taken out. Trained
with the encoder, a rotation becomes any linear map: what a depth's vectors are for the layers above and what they are
as embeddings need not be the same coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nestling.basis import pca
from nestling.embed.encode import encode
from nestling.embed.encoder import Encoder


class Rotation(nn.Module):
    """``x -> (x - mean) @ encode`` for vectors of one depth.

    Both are parameters that no gradient is taken of, unless ``requires_grad_`` says so.

    Args:
        encode: ``[H, H]``, orthogonal unless it was trained, the most valuable coordinate first.
        mean: ``[H]``, or None to leave vectors where they are.
    """

    mean: Tensor | None

    def __init__(self, encode: Tensor, mean: Tensor | None = None):
        super().__init__()
        if (
            encode.ndim != 2
            or encode.shape[0] != encode.shape[1]
            or (mean is not None and mean.shape != encode[0].shape)
        ):
            raise ValueError(f"expected encode [H, H] and mean [H], got {list(encode.shape)} and {_shape(mean)}")
        self.encode = nn.Parameter(encode.detach().float(), requires_grad=False)
        frozen = None if mean is None else nn.Parameter(mean.detach().float(), requires_grad=False)
        self.register_parameter("mean", frozen)

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates of ``[..., H]``, in its dtype."""
        centred = x if self.mean is None else x - self.mean.to(x)
        return centred @ self.encode.to(x)

    @property
    def keeps_similarities(self) -> bool:
        """Whether cosines at full width are those of the vectors as they come."""
        identity = torch.eye(len(self.encode), device=self.encode.device)
        return self.mean is None and torch.allclose(self.encode.mT @ self.encode, identity, rtol=0, atol=1e-4)

    def weight(self, dims: int) -> Tensor:
        """The first ``dims`` coordinates as the weight ``[dims, H]`` of a linear map."""
        return self.encode.detach()[:, :dims].mT.contiguous()

    def bias(self, dims: int) -> Tensor | None:
        """The bias ``[dims]`` that goes with `weight`; None where vectors are not centred."""
        if self.mean is None:
            return None
        return -(self.mean.detach().double() @ self.encode.detach()[:, :dims].double()).float()


def rotations(
    model: nn.Module, texts: Iterable[str], layers: Iterable[int], *, centred: bool = False, batch_size: int = 32
) -> dict[int, Rotation]:
    """The principal components of the pooled vectors at each depth, from one pass over texts.

    Args:
        model: a SentenceTransformer; it is put in eval mode for the pass.
        texts: some thousands, as they will be embedded (with their prompts, if there are any). Their vectors of all
            these depths are in memory at once.
        layers: depths from 1 on.
        centred: take the mean out, and the components of what is left.
        batch_size: texts at a time.

    Returns:
        ``{depth: Rotation}``.

    Raises:
        ValueError: there are no texts, or an embedding is not finite.
        UnsupportedEncoderError, LadderError: as `taps`.
    """
    given = list(texts)
    if not given:
        raise ValueError("expected texts to take principal components of, got none")
    widths = dict.fromkeys(sorted(set(layers)), Encoder.of(model).dims)
    found = encode(model, given, widths, batch_size=batch_size)
    return {depth: _components(vectors.double(), centred) for depth, vectors in found.items()}


def _components(vectors: Tensor, centred: bool) -> Rotation:
    mean = vectors.mean(0)
    covariance = vectors.mT @ vectors / len(vectors) - torch.outer(mean, mean) * centred
    return Rotation(pca(covariance).encode, mean if centred else None)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
