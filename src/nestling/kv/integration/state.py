"""What surrounds a pass of ours over a model: its mode, its implementation, its devices, and the modes of torch.

All of it is put back afterwards, so that a model is left as it was found.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.errors import UnsupportedModelError
from nestling.kv.integration.interface import base_model
from nestling.kv.integration.structure import text_config

P = ParamSpec("P")
R = TypeVar("R")
LARGE = 2**20  # elements of tables that are not copied: causal masks of old models, which are constants
REMEMBERED = int | float | str | None | Tensor  # what modules keep from one forward for the next


def decoder_part(lm: PreTrainedModel) -> PreTrainedModel:
    """The outermost model with the decoder's config: of a multimodal one the text part, or else the model itself."""
    config = text_config(lm)
    return next((m for m in lm.modules() if isinstance(m, PreTrainedModel) and m.config is config), lm)


def implementation(model) -> str | None:
    """The name of the decoder's attention implementation."""
    return text_config(base_model(model))._attn_implementation


def switch(model, name: str | None) -> None:
    """Have the decoder attend by another implementation, for a while; vision and other parts stay as they are."""
    text_config(base_model(model))._attn_implementation = name


@contextmanager
def as_found(model) -> Iterator[None]:
    """Afterwards the attention implementation and every module's mode are what they were before."""
    lm = base_model(model)
    if not isinstance(lm, PreTrainedModel):
        yield
        return
    modes, was = [(module, module.training) for module in model.modules()], implementation(lm)
    try:
        yield
    finally:
        if implementation(lm) != was:
            switch(lm, was)
        for module, training in modes:
            module.training = training


def leaves_as_found(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator for functions of a model, their first argument: see `as_found`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with as_found(args[0] if args else kwargs["model"]):
            return function(*args, **kwargs)

    return call


@contextmanager
def forgotten(model: nn.Module) -> Iterator[None]:
    """Afterwards modules keep what they kept before (rotary tables, position offsets), and random generators too."""
    kept = [item for module in model.modules() for item in _memory(module)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            yield
        finally:
            for names, name, value, copy in kept:
                names[name] = value
                if copy is not None and not value.is_inference():
                    value.data.copy_(copy)  # tables are written to in place


def _memory(module: nn.Module) -> list[tuple[dict[str, Any], str, Any, Tensor | None]]:
    """What a module remembers: where, by which name, what, and a copy of what may be written to."""
    states: list[tuple[dict[str, Any], str, Any, Tensor | None]] = []
    for names in (vars(module), module._buffers):
        for name, value in names.items():
            if isinstance(value, Tensor) and value.device.type != "meta" and value.numel() <= LARGE:
                states.append((names, name, value, value.detach().clone()))
            elif isinstance(value, REMEMBERED):
                states.append((names, name, value, None))
    return states


def input_device(model) -> torch.device:
    """Where token ids belong: the device on which the model's embeddings are looked up, wherever they are kept.

    Raises:
        UnsupportedModelError: if the model has no weights to run with.
    """
    lm = base_model(model)
    embeddings = lm.get_input_embeddings() if hasattr(lm, "get_input_embeddings") else None
    device = _device(embeddings) if isinstance(embeddings, nn.Module) else lm.device
    if device is None or device.type == "meta":
        raise UnsupportedModelError(f"{type(lm).__name__} is on the meta device: its weights are not loaded")
    return device


def layer_devices(model) -> dict[int, torch.device]:
    """The device on which each layer computes, by index, also where its weights are offloaded."""
    lm = base_model(model)
    devices = dict.fromkeys(range(text_config(lm).num_hidden_layers), input_device(lm))
    parts = [part for part in decoder_part(lm).modules() if getattr(part, "layer_idx", None) in devices]
    for part in reversed(parts):  # the outermost part of a layer has the last word
        if (device := _device(part)) is not None:
            devices[part.layer_idx] = device  # type: ignore[index]
    return devices


def _device(module: nn.Module) -> torch.device | None:
    """Where a module computes: its weights' device, or that to which accelerate's hooks bring them."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else None
