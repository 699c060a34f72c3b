"""A fit in the minutes that it is given: what it reads for them, and when they are too few."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nestling import kv
from nestling.errors import OptionError
from nestling.kv.calibration import pace
from nestling.kv.calibration.config import AUTO, FitConfig
from nestling.kv.calibration.pace import LEAST, Rates, of_share, paced, reduced, seconds

from ..families import tiny_model

TINY = dict(tokens=512, length=64, pieces=4, piece_length=64, sensitivity_length=64, window=0, context=64)
RATE = st.floats(1e-5, 1e-1)


@given(minutes=st.floats(0.1, 1000), rates=st.builds(Rates, RATE, RATE, RATE), layers=st.integers(1, 60))
def test_what_is_read_takes_no_more_than_the_minutes(minutes, rates, layers):
    config = FitConfig(minutes=minutes)
    try:
        smaller = reduced(config, rates, layers)
    except OptionError as error:
        assert f"minutes={minutes:g}" in str(error)
        least = of_share(replace(config, basis="balanced"), LEAST)
        assert seconds(least, rates, layers) > 60 * minutes
        return
    assert seconds(smaller, rates, layers) <= 60 * minutes
    for name in ("tokens", "pieces", "sensitivity_windows", "correction_pieces"):
        assert LEAST * getattr(config, name) <= getattr(smaller, name) <= getattr(config, name)
    kept = "length", "piece_length", "sensitivity_length", "sinks", "window", "seed"
    assert all(getattr(smaller, name) == getattr(config, name) for name in kept)
    if seconds(config, rates, layers) <= 60 * minutes and smaller.basis == AUTO:
        assert smaller == config


@given(minutes=st.floats(0.1, 500), rates=st.builds(Rates, RATE, RATE, RATE))
def test_more_minutes_never_read_less(minutes, rates):
    longer = FitConfig(minutes=2 * minutes, basis="pca")
    try:
        shorter = reduced(replace(longer, minutes=minutes), rates, 12)
    except OptionError:
        assume(False)
    assert seconds(shorter, rates, 12) <= seconds(reduced(longer, rates, 12), rates, 12)
    assert shorter.basis == "pca"


def test_bases_are_compared_only_while_that_takes_less_than_half():
    cheap, dear = (Rates(1e-4, simulated, 1e-4) for simulated in (1e-4, 1e-2))
    assert reduced(FitConfig(minutes=5), cheap, 12).basis == AUTO
    assert reduced(FitConfig(minutes=5), dear, 12).basis == "balanced"


def test_time_enough_changes_nothing_and_too_little_is_said():
    model = tiny_model("llama-gqa")
    ids = torch.randint(3, 90, (10, 64), generator=torch.Generator().manual_seed(0))
    config = FitConfig(**TINY)
    assert paced(model, ids, replace(config, minutes=60)) == replace(config, minutes=60)
    plain, timed = (kv.fit(model, None, ids, c, progress=False) for c in (config, replace(config, minutes=60)))
    for name in ("encode", "quantisation_cost", "step"):
        for side in ("key", "value"):
            assert torch.equal(getattr(plain, name)[side], getattr(timed, name)[side])
    with pytest.raises(OptionError, match="minutes=1e-06"):
        kv.fit(model, None, ids, replace(config, minutes=1e-6), progress=False)


def test_passes_are_timed_by_the_token(monkeypatch):
    model = tiny_model("llama-gqa")
    clock = iter([10.0, 16.0, 20.0, 32.0, 40.0, 76.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    config = FitConfig(**TINY | {"piece_length": 32})
    found = pace.rates(model, torch.randint(3, 90, (2, 64)), config)
    assert found == Rates(6 / 64, 12 / 64, 36 / 32)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), "5 minutes"])
def test_minutes_are_a_positive_number(minutes):
    with pytest.raises(OptionError, match="minutes"):
        FitConfig(minutes=minutes)
