"""Tiny models and adapters that tests share."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from .families import BASE, tiny_fit, tiny_model


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Random token ids ``[8, 64]``, none of them special."""
    return torch.randint(3, BASE["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def fitted(ids):
    """``fitted(family)``: the served ``model``, its ``adapter``, and an equal ``stock`` model that is left alone."""

    @cache
    def make(family: str) -> SimpleNamespace:
        model = tiny_model(family)
        adapter = tiny_fit(model, ids, sensitivity_windows=8)
        return SimpleNamespace(model=model, stock=tiny_model(family), adapter=adapter)

    return make
