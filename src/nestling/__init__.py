"""nestling: one model, every size. `nestling.kv`: KV caches of language models. `nestling.embed`: text encoders."""

from importlib import import_module

__all__ = ["embed", "kv"]


def __getattr__(name: str):
    """The wings, imported when they are asked for: torch and transformers take seconds."""
    if name in __all__:
        return import_module(f"nestling.{name}")
    raise AttributeError(f"module 'nestling' has no attribute {name!r}")
