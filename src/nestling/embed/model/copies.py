"""Copies of modules that share every tensor with the original: what a call needs changed is changed in a copy.

A model may be used by several threads at once, by stock code as well. So nothing here ever swaps the layers of a
model, puts hooks on it, or changes its train and eval flags, not even for the time of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from nestling.errors import UnsupportedEncoderError

M = TypeVar("M", bound=nn.Module)
DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]  # parameters, children, hooks


def plain(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    while (inner := module._modules.get("_orig_mod")) is not None:
        module = inner
    return module


def descend(module: nn.Module, path: str) -> nn.Module:
    """The submodule of that name; names do not mention wrappers of torch.compile."""
    module = plain(module)
    for name in path.split("."):
        module = plain(module.get_submodule(name))
    return module


def copied(module: M) -> M:
    """A copy of one module with the same tensors, children and hooks, that can be given others.

    It runs uncompiled: compiled code knows the module that it was made of.

    Raises:
        UnsupportedEncoderError: its ``forward`` was replaced by a function that only runs the original.
    """
    copy = type(module).__new__(type(module))
    for name, value in vars(module).items():
        new = _rebound(value, module, copy)
        if name == "forward" and new is value:
            kind = type(module).__name__
            raise UnsupportedEncoderError(f"the forward of a {kind} was replaced by a function of its own: undo that")
        vars(copy)[name] = new
    for name in DICTS:
        vars(copy)[name] = vars(copy)[name].copy()
    vars(copy)["_compiled_call_impl"] = None
    return copy


def copied_tree(root: M) -> M:
    """A copy of a module and of all modules inside."""
    known: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        module = plain(module)
        if module not in known:
            known[module] = copy = copied(module)
            for name, child in copy._modules.items():
                copy._modules[name] = None if child is None else visit(child)
        return known[module]

    return visit(root)  # type: ignore[return-value]


def copied_path(root: nn.Module, path: Sequence[str]) -> list[nn.Module]:
    """Copies of a module and of those on the way to a submodule, in this order; all others are the same."""
    copies = [copied(plain(root))]
    for name in path:
        copies.append(copied(plain(copies[-1].get_submodule(name))))
        copies[-2]._modules[name] = copies[-1]
    return copies


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """An attribute of a module for its copy: patched methods, which are bound to the module, are bound to the copy."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, partial) and any(argument is old for argument in value.args):
        return partial(
            value.func, *(new if argument is old else argument for argument in value.args), **value.keywords
        )
    return value
