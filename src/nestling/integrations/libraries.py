"""Importing a library that an integration is for, with an error that says how to get it."""

from importlib import import_module
from typing import Any

from nestling.errors import MissingExtraError


def library(module: str, extra: str, package: str | None = None) -> Any:
    """Import a module of another library.

    Args:
        module: its full name, such as ``"usearch.index"``.
        extra: of nestling, which brings the library.
        package: the library's name in a package registry, where it is not the module's.

    Raises:
        MissingExtraError: the library is not installed; the message names it and the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != root:  # something that the library itself needs
            raise
        raise MissingExtraError(
            f"{package or root} is not installed, and this needs it: pip install 'nestling[{extra}]'"
        ) from error
