"""Nested caches where nobody hands one over: in pipelines, evaluation harnesses, servers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from nestling.kv.cache.cache import NestedCache
from nestling.kv.integration.interface import cached
from nestling.kv.integration.state import as_found

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

NAMES = ("past_key_values", "cache")  # by which ``generate`` takes a cache, in older and newer versions


@contextmanager
def bound(model: Any, adapter: "KVAdapter", budget: Any = None) -> Iterator[None]:
    """Within it every ``model.generate()`` that is given no cache has a fresh nested one, whoever calls it.

    transformers has no public place where a kind of cache can be registered, so ``generate`` of this one object is
    wrapped, and put back afterwards. Calls with ``use_cache=False``, a ``cache_implementation`` or a cache of their
    own are left alone, and so is ``model(...)``.

    Args:
        model: the causal LM that the adapter was made for.
        budget: as for `NestedCache`: a share, text, an allocation or a `CacheConfig`.

    Raises:
        OptionError, AdapterError, BudgetError: as `NestedCache`, at once.
    """
    with as_found(model):
        NestedCache(model, adapter, budget)
        generate, own = model.generate, model.__dict__.get("generate")

        @wraps(generate)
        def with_cache(*args: Any, **kwargs: Any) -> Any:
            asked = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
            config = asked or model.generation_config
            uses = kwargs.get("use_cache", config.use_cache) is not False
            kind = kwargs.get("cache_implementation", getattr(asked, "cache_implementation", None))
            if uses and kind is None and all(kwargs.get(name) is None for name in NAMES):
                rest = {name: value for name, value in kwargs.items() if name not in NAMES}
                return generate(*args, **rest, **cached(model, NestedCache(model, adapter, budget)))
            return generate(*args, **kwargs)

        model.generate = with_cache
        try:
            yield
        finally:
            if own is None:
                del model.generate
            else:
                model.generate = own
