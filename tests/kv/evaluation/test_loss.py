"""Columns of losses: against NumPy, and an interval that covers what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.kv.evaluation.loss import PARTS, PIECE, interval, loss_columns


def losses(windows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(windows, tokens, generator=torch.Generator().manual_seed(seed)) ** 4


def test_columns_equal_numpy():
    kl = losses(3, 200)
    row, numbers = loss_columns(kl), kl.double().numpy()
    assert row["kl"] == pytest.approx(numbers.mean())
    for name, share in (("kl_median", 0.5), ("kl_99", 0.99), ("kl_99_9", 0.999)):
        assert row[name] == pytest.approx(np.quantile(numbers, share))
    assert row["kl_by_position"] == pytest.approx([numbers[:, i : i + 25].mean() for i in range(0, 200, 25)])
    assert (row["kl_first"], row["kl_last"]) == (row["kl_by_position"][0], row["kl_by_position"][-1])


@given(windows=st.integers(1, 3), tokens=st.integers(1, 40), seed=st.integers(0, 9))
def test_parts_make_the_whole_whatever_the_length(windows, tokens, seed):
    kl = losses(windows, tokens, seed)
    row = loss_columns(kl)
    sizes = [part.shape[1] for part in kl.tensor_split(min(PARTS, tokens), 1)]
    mean = sum(n * value for n, value in zip(sizes, row["kl_by_position"], strict=True)) / tokens
    assert row["kl"] == pytest.approx(mean)
    assert row["kl_low"] <= row["kl"] + 1e-9 and row["kl"] <= row["kl_high"] + 1e-9
    assert row["kl_median"] <= row["kl_99"] <= row["kl_99_9"]


def test_the_interval_covers_the_mean_of_all_texts():
    """Pieces whose tokens are alike: taken one by one, 2,048 of them would seem to say far more than they do."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(100):
        pieces = torch.randn(2, 16, 1, generator=generator).expand(-1, -1, PIECE).flatten(1)
        low, high = interval((1 + pieces).double())
        covered += low <= 1 <= high
    assert 85 <= covered <= 99
