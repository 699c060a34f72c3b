"""Search through all vectors, which is what others are measured by; and the best of many scores."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # scores of which only the largest is looked at first
CHUNK = 4096  # vectors that are compared with all queries at once
FIRST = 1 << 14  # scores up to which sorting out is as quick without blocks


def best(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest scores ``[n]``, in any order; all of them if there are fewer.

    The best are in the blocks with the largest maxima: looking at those alone takes a quarter of the time.
    """
    count = min(count, len(scores))
    whole = len(scores) // BLOCK * BLOCK
    if len(scores) < FIRST or count * BLOCK * 4 > whole:
        return scores.topk(count, sorted=False).indices
    blocks = scores[:whole].view(-1, BLOCK)
    chosen = blocks.amax(1).topk(count, sorted=False).indices
    places = (chosen[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    if whole < len(scores):
        places = torch.cat([places, torch.arange(whole, len(scores))])
    return places[scores[places].topk(count, sorted=False).indices]


def exact_best(
    vectors: np.ndarray, queries: np.ndarray, k: int, without: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The rows of the ``k`` vectors with the largest dot products, ``[m, k]``, best first.

    Args:
        vectors: ``[n, d]`` fp32.
        queries: ``[m, d]`` fp32.
        without: for each query a row that does not count, such as its own.
    """
    asked, scores, rows = torch.from_numpy(np.ascontiguousarray(queries)), [], []
    own = torch.as_tensor(np.full(len(asked), -1) if without is None else np.asarray(without))
    for start in range(0, len(vectors), CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(vectors[start : start + CHUNK]))
        found = asked @ part.T
        mine = ((own >= start) & (own < start + len(part))).nonzero()[:, 0]
        found[mine, own[mine] - start] = -torch.inf
        values, places = found.topk(min(k, len(part)))
        scores.append(values)
        rows.append(places + start)
    order = torch.cat(scores, 1).topk(k).indices
    return torch.cat(rows, 1).gather(1, order).numpy()


def recall(found: Sequence[Sequence], expected: Sequence[Sequence]) -> float:
    """The mean share of what is expected that was found, over queries."""
    shares = [len({*one} & {*other}) / max(1, len(other)) for one, other in zip(found, expected, strict=True)]
    return float(np.mean(shares))
