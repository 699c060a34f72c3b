"""Without a GPU, kernels in Triton are interpreted: it reads this when it is first imported, by torch for one."""

import os
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def quanto(monkeypatch):
    """quanto without its C++, which it compiles when it first unpacks: a minute of the tests of a new environment."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    compiled = import_module("optimum.quanto.library.extensions.cpp").ext
    monkeypatch.setattr(compiled, "_lib", SimpleNamespace(unpack=unpack))
