"""nestling: one model, every size. `nestling.kv`: KV caches of language models. `nestling.embed`: text encoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestling.errors import NestlingError
    from nestling.kv.adapter import KVAdapter
    from nestling.kv.cache.cache import NestedCache

OBJECTS = {
    "ElasticEncoder": "nestling.embed",
    "KVAdapter": "nestling.kv.adapter",
    "NestedCache": "nestling.kv.cache.cache",
    "NestlingError": "nestling.errors",
}
__all__ = ["ElasticEncoder", "KVAdapter", "NestedCache", "NestlingError", "__version__", "embed", "kv"]


def __getattr__(name: str) -> Any:
    """Wings and objects, imported when they are asked for: torch and transformers take seconds."""
    if name in ("embed", "kv"):
        return import_module(f"nestling.{name}")
    if name in OBJECTS:
        return getattr(import_module(OBJECTS[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("nestling")
    raise AttributeError(f"module 'nestling' has no attribute {name!r}")
