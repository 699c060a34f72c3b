"""The linear maps from heads to hidden states: how much an error of a value matters is what they make of it.

They are found and read by running them, whatever they are called and however their weights are kept: quantised,
offloaded, transposed, with LoRA.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from nestling.kv.integration.interface import NAME, PassThroughLayer, base_model, cached, sdpa
from nestling.kv.integration.modes import default_mode
from nestling.kv.integration.state import as_found, forgotten, input_device, switch
from nestling.kv.integration.structure import compressible_layers, head_shape, stock_layers, text_config

ROWS = 512  # of the identity that go through a map at once


def output_projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """The matrix of each layer's output projection by layer index, see `each_output_projection`."""
    return dict(each_output_projection(model))


def each_output_projection(model: PreTrainedModel) -> Iterator[tuple[int, Tensor]]:
    """The matrix ``[hidden, Hq * D]`` fp32 of each layer's output projection, on the CPU, with its layer's index.

    It is a linear map that an attention module applies after reading its cache: the one that is given the heads'
    outputs, ``Hq * D`` wide, or, where those are gated or normed first, the last one of such a width. Layers where
    none is found are absent.
    """
    lm = base_model(model)
    config = text_config(lm)
    heads, _, width = head_shape(config)
    layers, searches = stock_layers(config), {}
    for index in compressible_layers(config):
        layers[index] = searches[index] = _Search(heads * width, config.hidden_size)
    with as_found(lm), forgotten(lm), default_mode(gradients=False):
        lm.eval()
        switch(lm, NAME)
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(lm))
            lm(input_ids=ids, use_cache=True, **cached(lm, Cache(layers=layers)))
        finally:
            for search in searches.values():
                search.stop()
        for index, search in searches.items():  # one at a time: together they are large
            if (matrix := search.matrix()) is not None:
                yield index, matrix


class _Search(PassThroughLayer):
    """A cache layer that watches which parts of its attention module are called after it was read."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width, self.hidden = width, hidden
        self.called: list[tuple[nn.Module, Tensor]] = []
        self.hooks: list = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.states = key_states, value_states
        return self, self

    def attend(self, module, query, mask, **kwargs):
        self.out = sdpa(module, query, *self.states, mask, **kwargs)
        parts = [part for part in module.modules() if part is not module]
        self.hooks = [part.register_forward_pre_hook(self._see) for part in parts]
        return self.out

    def _see(self, part: nn.Module, inputs: tuple) -> None:
        within = any(part in outer.modules() for outer, _ in self.called)  # as the base of a LoRA layer is
        if not within and inputs and isinstance(inputs[0], Tensor) and inputs[0].shape[-1] == self.width:
            self.called.append((part, inputs[0]))

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def matrix(self) -> Tensor | None:
        first = [torch.equal(inputs.flatten(), self.out.flatten()) for _, inputs in self.called]
        later = [pair for pair, exact in zip(self.called, first, strict=True) if not exact]
        same = [pair for pair, exact in zip(self.called, first, strict=True) if exact]
        matrices = (_matrix(part, rows) for part, rows in (*same, *reversed(later)))
        return next((m for m in matrices if m is not None and len(m) == self.hidden), None)


def _matrix(part: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor | None:
    """The matrix of a linear map of vectors like ``given``; None if it is another kind of map, or changes nothing."""
    width = inputs.shape[-1]

    def run(rows: Tensor) -> Tensor:
        return part(rows.to(inputs)[None])[0].float().cpu()

    eye = torch.eye(width)
    probe = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    try:
        zero = run(torch.zeros(1, width))
        columns = torch.cat([run(rows) - zero for rows in eye.split(ROWS)])
        got = run(probe) - zero
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it takes more than one tensor, or another one
        return None
    expected = probe.to(inputs.dtype).float() @ columns
    linear = (got - expected).norm() <= 0.05 * expected.norm()
    if not linear or (columns.shape == eye.shape and torch.allclose(columns, eye)):
        return None
    return columns.mT.contiguous()
