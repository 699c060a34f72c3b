"""Grad modes and autocast: what a cache stores is of use in all of them, whichever was on when it was written.

A tensor that is made under ``torch.inference_mode`` can neither be written to nor saved for a backward pass outside
of it, storage that is part of a graph must not be written to in place, and autocast changes the dtype of products in
the middle of a calculation. So storage is always made as an ordinary tensor, and calculations of the cache are in the
precision that they choose themselves.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from nestling.errors import GradientError, UnsupportedModelError

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda", "mps", "xpu")  # that autocast can be on for


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or its copy if it was made in inference mode: one that can be written to in every mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def _ordinary(value):
    return ordinary(value) if isinstance(value, Tensor) else value


def restore(target: object, state: dict) -> None:
    """Set the attributes of a copy, or of what was read from a file, with tensors for every mode."""
    for name, value in state.items():
        if isinstance(value, list | tuple):
            value = type(value)(_ordinary(item) for item in value)
        setattr(target, name, _ordinary(value))


def traced(*tensors: Tensor | None) -> bool:
    """Whether a graph is being built that one of the tensors is a part of."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast on that device."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_default_mode(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs outside of the caller's inference mode, ``no_grad`` and autocast: alike in all."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with default_mode():
            return function(*map(_ordinary, args), **{name: _ordinary(value) for name, value in kwargs.items()})

    return run


@contextmanager
def default_mode(gradients: bool = True) -> Iterator[None]:
    """A context outside of the caller's inference mode and autocast, with or without gradients."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in DEVICES:
            stack.enter_context(full_precision(torch.device(device)))
        yield


def check_weights(model) -> None:
    """Raise `UnsupportedModelError` if gradients cannot be computed through the model's weights."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"this {type(model).__name__} was loaded under torch.inference_mode, so that no gradient can be computed "
            "through its weights: load it outside of inference_mode"
        )


class NoGradient(torch.autograd.Function):
    """States that were read from codes: a backward pass through them is refused, since it would lose a part."""

    @staticmethod
    def forward(ctx, states: Tensor, witness: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise GradientError(
            "a gradient was asked for that would have to pass through quantised keys and values, which have none: "
            "read the prompt under torch.no_grad(), or use a cache without bits"
        )


def without_gradient(states: Tensor) -> Tensor:
    """The same numbers; a backward pass that reaches them raises `GradientError`."""
    return NoGradient.apply(states, torch.zeros((), device=states.device, requires_grad=True))
