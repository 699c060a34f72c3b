"""A start for prefixes: what to read off the pooled vectors of each depth, the most valuable coordinate first.

Principal components say how a depth's vectors vary. What a small size is for is to tell what the full model, or a
teacher, would: a regression of their embeddings on the depth's vectors finds that in closed form, before any training.
Trained with the encoder, a projection stays any linear map: what a depth's vectors are for the layers above and what
they are as embeddings need not be the same coordinates. It can be folded into the linear map that cuts an exported
model to its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nestling.basis import balanced, pca
from nestling.embed.model.encode import encode_prompted, strings_of
from nestling.embed.model.parts import Encoder
from nestling.embed.model.similarity import Similarity
from nestling.errors import ExampleError, OptionError, UnsupportedEncoderError
from nestling.options import whole

Kind = Literal["aligned", "centred", "pca"]
KINDS = get_args(Kind)
RIDGE = 0.03  # of the regression, in mean variances of the vectors
# Aligned coordinates are divided by their spreads to this power. 0 keeps similarities as near to the target's as can
# be; 0.5 lets lesser directions, which tell like texts apart, count for more.
FLATTEN = 0.5
OWN = 0.03  # how much of a depth's own vectors is aligned to beside the target, in spreads of the target


class Projection(nn.Module):
    """``x -> (x - mean) @ encode`` for vectors of one depth.

    Both are parameters that no gradient is taken of, unless ``requires_grad_`` says so.

    Args:
        encode: ``[H, H]``, the most valuable coordinate first; orthogonal if it is of principal components.
        mean: ``[H]``, or None to leave vectors where they are.
        space: the id of the space that its coordinates are of, if other depths write in it too.
    """

    mean: Tensor | None

    def __init__(self, encode: Tensor, mean: Tensor | None = None, space: str | None = None):
        super().__init__()
        self.space = space
        if (
            encode.ndim != 2
            or encode.shape[0] != encode.shape[1]
            or (mean is not None and mean.shape != encode[0].shape)
        ):
            raise OptionError(f"expected encode [H, H] and mean [H], got {list(encode.shape)} and {_shape(mean)}")
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


def fit_projections(
    model: nn.Module,
    texts: Iterable[str],
    layers: Iterable[int],
    *,
    kind: Kind = "aligned",
    target: Tensor | None = None,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    prompts: Sequence[str] | None = None,
) -> dict[int, Projection]:
    """Start projections of the pooled vectors at each depth, from one pass over texts.

    Where the model compares by something in which lengths count, they keep them: vectors of the full model are
    predicted as they are, not as unit vectors, nothing is flattened, and for dot products nothing is centred.

    Args:
        model: a SentenceTransformer.
        texts: some thousands, as they will be embedded (with their prompts, if there are any). Their vectors of all
            these depths are in memory at once.
        layers: depths from 1 on.
        kind: ``"aligned"``: the principal components of what can be predicted of the full model's embeddings from the
            vectors, by a linear map (reduced-rank ridge regression); the full depth has its own components, centred.
            ``"centred"``: the principal components of the vectors, with their mean taken out; ``"pca"``: without.
        target: for ``"aligned"``: the embeddings of the texts ``[n, D]`` by another model, of any width, that are
            predicted instead.
        batch_size: texts at a time.
        advance: told how many texts are done, after each batch.
        prompts: what of each text, at its start, is its prompt: a model that leaves prompts out of its pooling
            (``include_prompt=False``) has to know.

    Returns:
        ``{depth: Projection}``.

    Raises:
        ValueError: there are no texts, the kind is none of these, the target is of other texts, or an embedding is not
            finite.
        UnsupportedEncoderError: the model compares by the Manhattan distance, which no projection keeps; or as `taps`.
        LadderError: as `taps`.
    """
    whole("batch_size", batch_size)
    given, parts = strings_of(texts), Encoder.of(model)
    similarity = Similarity.of(parts.model)
    check_turns(similarity, kind)
    if not given:
        raise ExampleError("expected texts to take projections from, got none")
    if kind not in KINDS:
        raise OptionError(f"kind must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {kind!r}")
    if target is not None and (target.ndim != 2 or len(target) != len(given)):
        raise OptionError(f"expected the target's embeddings of {len(given)} texts, got {list(target.shape)}")
    depths = sorted(set(layers))
    needed = {*depths, parts.depth} if kind == "aligned" and target is None else depths
    if prompts is not None and (len(prompts) != len(given) or not all(map(str.startswith, given, prompts))):
        raise OptionError(f"expected prompts that {len(given)} texts start with, got {len(prompts)}")
    sizes = dict.fromkeys(sorted(needed), parts.dims)
    found = encode_prompted(model, given, prompts or [""] * len(given), sizes, batch_size=batch_size, advance=advance)
    vectors = {depth: pooled.double() for depth, pooled in found.items()}
    if kind != "aligned":
        return {depth: _components(vectors[depth], kind == "centred") for depth in depths}
    centred = similarity.unit or similarity.name != "dot"
    wanted = similarity.finished(vectors[parts.depth] if target is None else target.cpu().double())
    turned = {}
    for depth in depths:
        if depth == parts.depth:
            turned[depth] = _components(vectors[depth], centred)
            continue
        encode, mean = _aligned(vectors[depth], wanted, FLATTEN if similarity.unit else 0.0, centred)
        turned[depth] = _scaled(encode, mean) if similarity.unit else Projection(encode, mean)
    return turned


def check_turns(similarity: Similarity, kind: str = "aligned") -> None:
    """Whether a model of that similarity can have projections of that kind.

    Raises:
        UnsupportedEncoderError: none.
        OptionError: not those.
    """
    if not similarity.unit and similarity.name == "manhattan":
        raise UnsupportedEncoderError(
            "the model compares by the Manhattan distance of its coordinates, which no projection of them keeps: cut "
            'its sizes out as they are, or set model.similarity_fn_name = "cosine" if that is how it was trained'
        )
    if not similarity.unit and similarity.name == "dot" and kind == "centred":
        raise OptionError('kind="centred" changes dot products, by which the model compares: take aligned or pca')


def _components(vectors: Tensor, centred: bool) -> Projection:
    mean = vectors.mean(0)
    covariance = vectors.mT @ vectors / len(vectors) - torch.outer(mean, mean) * centred
    return Projection(pca(covariance).encode, mean if centred else None)


def _aligned(vectors: Tensor, wanted: Tensor, flatten: float, centred: bool) -> tuple[Tensor, Tensor | None]:
    """The balanced basis whose prefixes tell most of ``wanted`` ``[n, D]``, and a mean: ``[H, H], [H]``.

    With C the covariance of the vectors and B the ridge regression of ``wanted`` on them, dropping coordinates costs
    ``balanced(C, B B^T)`` least: the error of a vector is weighed by what it changes in the prediction. The variances
    S of its coordinates are brought to S^(2 - 2 flatten). A little of the vectors themselves is wanted too, so that
    coordinates beyond what the target has are not empty.
    """
    mean = vectors.mean(0) * centred
    inputs, wanted = vectors - mean, wanted - wanted.mean(0) * centred
    spread = [part.square().sum(-1).mean().sqrt() for part in (inputs, wanted)]
    wanted = torch.cat((wanted, inputs * (OWN * spread[1] / spread[0].clamp_min(1e-12))), 1)
    covariance = inputs.mT @ inputs / len(inputs)
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(1e-12)
    regularised = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
    predicts = torch.linalg.solve(regularised, inputs.mT @ wanted / len(inputs))
    basis = balanced(covariance, predicts @ predicts.mT, ridge=1e-12)
    spreads = basis.energy.clamp_min(basis.energy[0].clamp_min(1e-12) * 1e-12).sqrt()
    return basis.encode * spreads ** (0.5 - flatten), mean if centred else None


def _scaled(encode: Tensor, mean: Tensor | None) -> Projection:
    """As large as an orthogonal matrix, since learning rates are for entries of that size."""
    return Projection(encode * (len(encode) ** 0.5 / encode.norm().clamp_min(1e-12)), mean)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
