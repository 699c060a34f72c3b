"""How well sizes agree with a full model on plain texts: what can be measured where there is no labelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn

from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import encode, stored_prompts, strings_of, widths
from nestling.embed.model.own import chosen
from nestling.embed.model.parts import Encoder
from nestling.embed.model.similarity import COSINE, Similarity
from nestling.errors import EvaluationError
from nestling.options import whole

NEIGHBOURS = 10
NOTE = (
    "Agreement is Spearman's correlation between a text's similarities to all others by the size and by the full "
    "model, the mean over texts; overlap is the share of its ten nearest neighbours that both find."
)
COLUMNS = {"method": "method", "size": "size", "agreement": "agreement", "overlap": f"overlap@{NEIGHBOURS}"}


def full_vectors(model: nn.Module, texts: Sequence[str], prompt: str | None = None, batch_size: int = 32) -> Tensor:
    """Vectors ``[n, D]`` of the whole model, fp32 on the CPU: the reference of `agreement`.

    They are unit vectors, unless the model compares by something in which lengths count.
    """
    encoder = Encoder.of(model)
    size = {encoder.depth: encoder.dims}
    found = encode(model, strings_of(texts), size, prompt=_prompt(model, prompt), batch_size=batch_size)
    return Similarity.of(encoder.model).finished(found[encoder.depth])


def agreement(
    model: nn.Module,
    texts: Iterable[Any],
    sizes: Ladder | Iterable[Size],
    reference: Tensor | None = None,
    *,
    projections: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    prompt: str | None = None,
    method: str = "",
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """A row for each size: ``method, size``, and how close its rankings are to those of a full model.

    ``agreement`` is Spearman's correlation between a text's similarities to all other texts by the size and by the
    reference, the mean over texts. ``overlap`` is the share of its ten nearest neighbours that the two have in common.

    Args:
        texts: strings, or rows with a column ``text``, in a list, a data frame, a data set or any iterable.
        reference: unit vectors ``[n, D]`` of the texts, compared by cosine; by default the vectors of this model at
            full size, which like its sizes are compared by its own similarity.
        projections: by depth, as the sizes were trained with; by default the model's own, if it was trained with any.
        prompt: in front of texts; by default the model's own.
        method: what the rows say in that column.
        batch_size: texts in a forward.

    Raises:
        EvaluationError: there are too few texts to have ten neighbours.
    """
    whole("batch_size", batch_size)
    texts = strings_of(texts)
    if len(texts) <= NEIGHBOURS + 1:
        raise EvaluationError(
            f"{len(texts)} texts are too few to compare rankings on: give more than {NEIGHBOURS + 1}"
        )
    asked = [Ladder.parse([size]).full for size in (Ladder.parse(sizes) if isinstance(sizes, str) else sizes)]
    similarity = Similarity.of(Encoder.of(model).model)
    if reference is None:
        wanted = _rows(full_vectors(model, texts, prompt, batch_size), similarity)
    elif reference.ndim != 2 or len(reference) != len(texts):
        raise EvaluationError(f"reference {list(reference.shape)}: expected the vectors of {len(texts)} texts")
    else:
        wanted = _rows(reference, COSINE)
    ranks, nearest = _ranks(wanted), wanted.topk(NEIGHBOURS).indices
    used = _prompt(model, prompt)
    turned = chosen(projections, model)
    found = encode(model, texts, widths(asked), prompt=used, projections=turned, batch_size=batch_size)
    rows = []
    for size in asked:
        similar = _rows(similarity.finished(found[size.layers][:, : size.dims]), similarity)
        shared = (similar.topk(NEIGHBOURS).indices[:, :, None] == nearest[:, None, :]).any(-1)
        spearman = torch.nn.functional.cosine_similarity(_ranks(similar), ranks, dim=-1).mean()
        rows.append({"method": method, "size": size.name, "agreement": float(spearman), "overlap": _mean(shared)})
    return rows


class AgreementEvaluator(BaseEvaluator):
    """Measures `agreement` during a training, of texts without labels.

    Called, it returns ``mean_agreement`` of every size (``"6x128_mean_agreement"``) and their ``mean``, its
    ``primary_metric``.

    Args:
        texts: more than eleven.
        reference: vectors ``[n, D]`` that the sizes should agree with, as of `agreement`.
        prompt: in front of texts.
    """

    def __init__(self, texts: Sequence[str], reference: Tensor, prompt: str = ""):
        super().__init__()
        self.texts, self.reference, self.prompt, self.name = list(texts), reference, prompt, ""
        self.ladder: Ladder | None = None
        self.projections: Mapping[int, Any] | None = None
        self.primary_metric = "mean"

    def metric_names(self, model: nn.Module) -> list[str]:
        """What a call during a training of that model returns."""
        return [*(f"{size}_mean_agreement" for size in self._sizes(model)), "mean"]

    def __call__(
        self, model: nn.Module, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        rows = agreement(
            model, self.texts, self._sizes(model), self.reference, projections=self.projections, prompt=self.prompt
        )
        metrics = {f"{row['size']}_mean_agreement": row["agreement"] for row in rows}
        return metrics | {"mean": sum(metrics.values()) / len(metrics)}

    def _sizes(self, model: nn.Module) -> Ladder:
        encoder = Encoder.of(model)
        return self.ladder or Ladder.default(encoder.depth, encoder.dims)


def _rows(vectors: Tensor, similarity: Similarity) -> Tensor:
    """Each text's similarities to the others, ``[n, n - 1]``."""
    count = len(vectors)
    others = ~torch.eye(count, dtype=torch.bool)
    return similarity.scores(vectors, vectors)[others].view(count, count - 1)


def _ranks(rows: Tensor) -> Tensor:
    """Ranks within each row, centred; ties, which similarities in fp32 hardly have, are broken by place."""
    ranks = rows.argsort(-1).argsort(-1).double()
    return ranks - ranks.mean(-1, keepdim=True)


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _prompt(model: nn.Module, prompt: str | None) -> str:
    return stored_prompts(Encoder.of(model).model)["sts"] if prompt is None else prompt
