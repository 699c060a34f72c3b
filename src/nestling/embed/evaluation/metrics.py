"""What is measured on embeddings: Spearman's correlation on scored pairs, nDCG@10 and recall@100 on retrieval sets."""

import math
from collections.abc import Mapping, Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

from nestling.embed.model.similarity import COSINE, Similarity

# Columns of results that are no metrics; all others are, sets of scored pairs under names of their own.
BESIDE = ("model", "method", "size", "seed", "epoch", "steps", "minutes", "seconds", "peak_mib")
CUTOFF, DEPTH = 10, 100  # of nDCG and of recall
CHUNK = 1 << 24  # scores held at once


def spearman(first: Tensor, second: Tensor, scores: Sequence[float], similarity: Similarity = COSINE) -> float:
    """Spearman's rank correlation of the similarity of pairs with their scores, ties given their mean rank.

    Args:
        first, second: embeddings ``[n, d]``, of any length.
        scores: n of them.
        similarity: of the model that they are of.

    Returns:
        From -1 to 1; NaN if all similarities, or all scores, are equal.
    """
    found = similarity.pairs(similarity.finished(first), similarity.finished(second)).numpy()
    if found.max() == found.min() or max(scores) == min(scores):
        return math.nan
    return float(spearmanr(found, scores).statistic)


def ranking(
    queries: Tensor,
    corpus: Tensor,
    relevant: Sequence[Mapping[int, float]],
    itself: Sequence[int | None] | None = None,
    similarity: Similarity = COSINE,
) -> tuple[float, float]:
    """Mean nDCG@10 and recall@100 of exact search.

    Gains are those of the judgements, not only 0 and 1, and enter linearly, as in trec_eval and so in BEIR. Documents
    with equal scores are ranked in the order of the corpus. Scores are held for a few queries at a time.

    Args:
        queries: embeddings ``[q, d]``, of any length.
        corpus: embeddings ``[n, d]``, of any length.
        relevant: for each query, the gain (above zero) of its relevant documents by their place in the corpus; places
            below 0 are of documents that are not there. A query without any counts, and finds nothing.
        itself: for each query, the place of the document that it is, which is not searched for it, or None.
        similarity: of the model that they are of.

    Returns:
        nDCG@10, recall@100.
    """
    queries, corpus = similarity.finished(queries), similarity.finished(corpus)
    rows = max(1, CHUNK // len(corpus))
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(queries), rows):
        scores = similarity.scores(queries[start : start + rows], corpus)
        for number, row in enumerate(scores, start):
            gains, own = relevant[number], None if itself is None else itself[number]
            best = [place for place in _best(row, DEPTH + 1) if place != own][:DEPTH]
            found = sum(place in gains for place in best) / max(1, len(gains))
            totals += torch.tensor([_ndcg(best[:CUTOFF], gains), found], dtype=torch.float64)
    ndcg, recall = (totals / len(queries)).tolist()
    return ndcg, recall


def _best(scores: Tensor, count: int) -> list[int]:
    """Places of the highest scores ``[n]``, highest first and equal ones in order, which topk does not promise."""
    least = scores.topk(min(count, len(scores))).values[-1]
    places = (scores >= least).nonzero()[:, 0]
    return places[scores[places].argsort(descending=True, stable=True)][:count].tolist()


def _ndcg(best: Sequence[int], gains: Mapping[int, float]) -> float:
    if not gains:
        return 0.0
    ideal = sorted(gains.values(), reverse=True)[:CUTOFF]
    return _dcg([gains.get(place, 0.0) for place in best]) / _dcg(ideal)


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
