"""From the KL of every token to the columns of a row: the mean and how sure it is, the tail, the course over a text.

A mean hides both where a cache fails: a few tokens in a hundred, and the end of a long text.
"""

import torch
from torch import Tensor

PARTS = 8  # of a text, by position
PIECE = 128  # tokens in a row that are drawn together: neighbours are alike
DRAWS = 1000


def loss_columns(kl: Tensor) -> dict[str, float | list[float]]:
    """The columns of losses ``[n, T]`` in nats, of n texts of T tokens.

    Returns:
        ``kl``: the mean; ``kl_low, kl_high``: its interval of 95 %, by a bootstrap over pieces of 128 tokens;
        ``kl_median, kl_99, kl_99_9``: quantiles over tokens; ``kl_first, kl_last``: means over the first and the last
        eighth of the texts, and ``kl_by_position``: over each eighth.
    """
    kl = kl.double()
    quantiles = torch.quantile(kl.flatten(), torch.tensor([0.5, 0.99, 0.999], dtype=torch.float64)).tolist()
    parts = [float(part.mean()) for part in kl.tensor_split(min(PARTS, kl.shape[1]), 1)]
    low, high = interval(kl)
    return {
        "kl": float(kl.mean()), "kl_low": low, "kl_high": high,
        **dict(zip(("kl_median", "kl_99", "kl_99_9"), quantiles, strict=True)),
        "kl_first": parts[0], "kl_last": parts[-1], "kl_by_position": parts,
    }  # fmt: skip


def interval(kl: Tensor) -> tuple[float, float]:
    """Between which two means 95 of 100 redrawn sets of pieces lie, the same ones for equal shapes of ``kl``."""
    pieces = kl.split(PIECE, 1)
    sums = torch.stack([piece.sum(1) for piece in pieces], 1).flatten()
    counts = torch.tensor([piece.shape[1] for piece in pieces], dtype=torch.float64).repeat(len(kl))
    drawn = torch.randint(len(sums), (DRAWS, len(sums)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
