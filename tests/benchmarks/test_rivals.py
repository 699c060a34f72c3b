"""Simulated rivals: their codes, their bytes, and that windows before them are exact."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare, held_bytes

from ..kv.families import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
rivals, baselines, kv_cost = (importlib.import_module(name) for name in ("rivals", "baselines", "kv_cost"))
sys.path.pop(0)


def states(tokens: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def config():
    return tiny_model("llama-gqa", head_dim=64).config


def test_levels_are_those_of_the_literature():
    """Max, 1960: one bit is the mean of half a Gaussian, and two bits have these levels and this distortion."""
    assert rivals.gaussian_levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-3)
    assert rivals.gaussian_levels(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=2e-3)
    x, levels = states(400), rivals.gaussian_levels(3)
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    assert float((nearest - x).square().mean()) == pytest.approx(0.03454, rel=0.03)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_rotation_makes_any_vector_gaussian(config, bits):
    """One large coordinate costs no more than the distortion of a Gaussian."""
    x = states(50)
    x[..., 7] *= 50
    layer = rivals.turbo_cache(config, bits).layers[0]
    keys, _ = layer.update(x, x)
    share = ((keys - x).square().sum(-1) / x.square().sum(-1)).mean()
    assert float(share) < {3: 0.06, 4: 0.02}[bits]
    assert held_bytes(baselines.Cache(layers=[layer])) == 2 * 2 * 3 * 50 * (64 * bits // 8 + 2)


def test_tiles_are_balanced_over_tokens_and_channels(config):
    """Tokens and channels of any size: after balancing all of them are coded alike, which plain groups do not do."""
    x = states(256) * torch.logspace(-1, 1, 256)[:, None]
    layer = rivals.kvarn_cache(config).layers[0]
    for part in x.split(50, 2):
        keys, values = layer.update(part, part)
    assert layer.get_seq_length() == 256 and keys.shape == x.shape
    assert float(((keys - x).square().sum(-1) / x.square().sum(-1)).max()) < 0.05
    assert float(((values - x).square().sum(-1) / x.square().sum(-1)).mean()) < 0.2
    keys_bytes, values_bytes = 128 * 32 + 2 * (128 + 2 * 64), 128 * 16 + 2 * (64 + 2 * 128)
    assert held_bytes(baselines.Cache(layers=[layer])) == 2 * 3 * 2 * (keys_bytes + values_bytes)


def test_rotated_codes_come_back(config):
    """A rotation and back, at two bits, and the bytes of codes and of one range a token."""
    x = states(64)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    turns = {i: (basis.expand(3, 64, 64), basis.expand(3, 64, 64)) for i in range(4)}
    layer = rivals.oscar_cache(config, turns).layers[0]
    keys, values = layer.update(x, x)
    assert float((keys - x).square().mean()) < 0.4
    assert held_bytes(baselines.Cache(layers=[layer])) == 2 * 2 * 3 * 64 * (16 + 4)


@pytest.mark.parametrize("name", [name for name in kv_cost.THEIRS if name != "fp8"])
def test_first_and_recent_tokens_are_exact(config, name):
    layer = kv_cost.THEIRS[name](config).layers[0]
    x = states(300).bfloat16().float()
    for part in x.split(30, 2):
        keys, values = layer.update(part, part)
        assert layer.get_seq_length() == keys.shape[2] == values.shape[2]
    for read in (keys, values):
        assert torch.equal(read[:, :, :4], x[:, :, :4]) and torch.equal(read[:, :, -64:], x[:, :, -64:])
        assert not torch.equal(read[:, :, 4:-94], x[:, :, 4:-94]) or name == "kvarn-4-2"


def test_the_control_is_the_full_model_and_fp8_is_near():
    model = tiny_model("llama-gqa")
    ids = torch.randint(3, 97, (2, 200), generator=torch.Generator().manual_seed(1))
    entrants = [
        Candidate(name, None, lambda make=make: make(model.config))
        for name, make in (("control", kv_cost.control), ("fp8", kv_cost.THEIRS["fp8"]))
    ]
    rows = compare(model, None, ids, entrants, EvalConfig(windows=2, length=200, chunk=50), progress=False)
    assert abs(rows[1]["kl"]) < 1e-6 and 1e-6 < rows[2]["kl"] < 0.01
    assert rows[2]["bytes_share"] < 1
