"""What a training that does not end leaves behind: nothing but its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn


class Undo:
    """Copies of what a training changes, in the CPU's memory: to put a model back as it was, when it is stopped.

    The object that was trained can then be trained again, or resumed, as if it had just been loaded.

    Args:
        module: whose parameters that require gradients, and whose buffers, are kept.
    """

    def __init__(self, module: nn.Module):
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        changing: list[Tensor] = [*self.parameters, *module.buffers()]
        self.kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in changing]

    def put_back(self) -> None:
        for tensor, before in self.kept:
            tensor.data.copy_(before)
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def withdrawn(folder: Path, unless: Callable[[], bool]) -> Iterator[None]:
    """A folder that the block makes is removed if the block fails, unless there is something in it to go on from."""
    made = not folder.exists()
    try:
        yield
    except Exception:
        if made and not unless():
            shutil.rmtree(folder, ignore_errors=True)
        raise
