"""A model without dropout, for as long as it follows a teacher whose vectors do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_dropout(model: nn.Module, off: bool = True) -> Iterator[None]:
    """Dropout of modules, and of attention functions (numbers that layers carry), is zero while the block lasts.

    The model stays in train mode, which gradient checkpointing needs. With ``off=False`` nothing is changed.
    """
    found = [
        (module, name, value)
        for module in (model.modules() if off else ())
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout)))
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
