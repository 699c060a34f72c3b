"""nestling: one model, every size. `nestling.kv` makes the KV cache of a language model nested."""

from nestling import kv

__all__ = ["kv"]
