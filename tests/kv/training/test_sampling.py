"""Rank schedules: what they draw, and that a draw depends on nothing but the seed and the number of the text."""

import pytest
import torch

from nestling.kv import KVAdapter
from nestling.kv.allocation.table import Allocation
from nestling.kv.training.sampling import FEWEST_BITS, MOST_BITS, SAMPLINGS, schedule


@pytest.fixture(scope="module")
def adapter(fitted):
    return fitted("qwen3").adapter  # width 24: three steps


@pytest.mark.parametrize("name", [name for name in SAMPLINGS if name != "bits"])
def test_draws_are_tables_and_repeat(adapter, name):
    draw, again, other = (schedule(name, adapter, seed=seed) for seed in (0, 0, 1))
    layers, heads, width = adapter.shape
    for number in range(40):
        bits = draw(number)
        assert bits.shape == (2, layers, heads, width // 8) and bits.dtype == torch.int64
        assert (bits[..., 0] == 16).all() and not (bits % 16).any() and (bits.diff(dim=-1) <= 0).all()
        assert torch.equal(bits, again(number))
    differ = [not torch.equal(draw(number), other(number)) for number in range(40)]
    assert any(differ)


def test_independent_ranks_are_uniform_over_eighths(fitted):
    adapter = fitted("qwen3").adapter
    eye = {side: torch.eye(64).expand(3, 2, 64, 64) for side in ("key", "value")}
    one = {side: torch.ones(3, 2, 64) for side in eye}
    draw = schedule("independent", KVAdapter({**adapter.fingerprint, "head_dim": 64}, eye, one, one))
    ranks = torch.stack([(draw(number) > 0).sum(-1) for number in range(400)])
    values, counts = ranks.unique(return_counts=True)
    assert values.tolist() == list(range(1, 9))
    assert (counts / ranks.numel() - 1 / 8).abs().max() < 0.02
    pairs = ranks.flatten(1).double()
    assert torch.corrcoef(pairs.T).fill_diagonal_(0).abs().max() < 0.25  # no two of them move together


def test_the_path_follows_the_allocation(fitted):
    """At most a step away from the allocation of some share, over the whole range of shares."""
    adapter = fitted("qwen3").adapter
    draw = schedule("path", adapter)
    shares = []
    for number in range(60):
        bits = draw(number)
        tables = [adapter.allocate(share / 100, quantise=False).stacked for share in range(34, 101)]
        assert min(int((bits - table).sum(-1).abs().max()) for table in tables) <= 16
        shares.append(8 * bits.sum() / (16 * adapter.full_elements))
    assert min(shares) < 0.45 and max(shares) > 0.8


def test_every_other_text_is_quantised(fitted):
    """Those are at allotted bits, of all sizes; the others at 16 bits for the ranks of the path."""
    adapter = fitted("qwen3").adapter  # width 24: three blocks
    draw, path = schedule("bits", adapter), schedule("path", adapter)
    sizes = []
    for number in range(80):
        bits = draw(number)
        assert bits.shape == (2, *adapter.shape[:2], 3) and torch.equal(bits, draw(number))
        if number % 2:
            table = Allocation(*bits, adapter.shape[2])
            table.check(*adapter.shape)
            sizes.append(table.bits / adapter.full_elements)
            assert torch.equal(bits, adapter.allocate(sizes[-1] / 16).stacked)
        else:
            assert torch.equal(bits, path(number))
    assert FEWEST_BITS - 0.2 < min(sizes) < 1 and 3.5 < max(sizes) <= MOST_BITS


def test_unknown_names_are_refused(adapter):
    with pytest.raises(ValueError, match="sampling='random' is unknown: expected one of path, independent, bits"):
        schedule("random", adapter)
