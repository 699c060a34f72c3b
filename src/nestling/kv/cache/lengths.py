"""What a cache takes in bytes at each length of text, told from its allocation: no model runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nestling.errors import OptionError
from nestling.kv.cache.bases import LayerBases, nbytes
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.factory import Plan, planned
from nestling.kv.cache.storage import Storage, members
from nestling.kv.cache.window import TOKENS_PER_BLOCK
from nestling.options import shown

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SIXTEEN_BITS = torch.bfloat16


def bytes_by_length(adapter: "KVAdapter", budget: Any = None, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """What a cache of one text holds once it has some numbers of tokens, however they came, in the compressed layers.

    Args:
        budget: as for `NestedCache`, or a `CacheConfig`; without a ``dtype`` the cache stores 16 bits.

    Returns:
        A row for each length: ``tokens``, ``bytes``, ``full_bytes`` (of the full cache in the stored dtype) and
        ``share`` of them. Bases are not counted, see `shared_bytes`.

    Raises:
        OptionError: for options by which bytes depend on more than the length: a limit, or tokens that are evicted.
        BudgetError: the budget or allocation cannot be met.
    """
    options = budget if isinstance(budget, CacheConfig) else CacheConfig(budget=budget)
    plan = plan_of(adapter, options)
    if options.keep_tokens < 1:
        raise OptionError(f"keep_tokens={shown(options.keep_tokens)}: which tokens are kept depends on the text")
    storage = Storage(options.sinks, plan.window, TOKENS_PER_BLOCK, options.context, plan.rows)
    (_, heads, width), itemsize = adapter.shape, _dtype(options).itemsize
    states = heads, width, itemsize
    layers = list(zip(plan.allocation.token_bytes(itemsize), plan.allocation.full, strict=True))
    rows = []
    for tokens in lengths:
        stored = sum(storage.nbytes(tokens, size, states, full) for size, full in layers)
        full_bytes = tokens * adapter.full_elements * itemsize
        rows.append({"tokens": tokens, "bytes": stored, "full_bytes": full_bytes, "share": stored / full_bytes})
    return rows


def shared_bytes(adapter: "KVAdapter", budget: Any = None) -> int:
    """Bytes of the bases that all caches of an adapter and an allocation share: `NestedCache.shared_nbytes`.

    Args:
        budget: as for `bytes_by_length`.

    Raises:
        BudgetError: the budget or allocation cannot be met.
    """
    options = budget if isinstance(budget, CacheConfig) else CacheConfig(budget=budget)
    allocation, half = plan_of(adapter, options).allocation, _dtype(options).itemsize == SIXTEEN_BITS.itemsize
    rows = range(adapter.shape[0])
    return nbytes(LayerBases.of(adapter._layer_bases(row), members(allocation, row), half) for row in rows)


def plan_of(adapter: "KVAdapter", options: CacheConfig) -> Plan:
    """What a new cache of these options starts with.

    Raises:
        OptionError: the options have a limit alone, under which the allocation depends on the length.
        BudgetError: the budget or allocation cannot be met.
    """
    plan = planned(adapter, options)
    if plan.factory is not None and (limit := plan.factory.limit) is not None:
        raise OptionError(f"{limit.given} is never exceeded at any length: give a share for bytes by length")
    return plan


def _dtype(options: CacheConfig) -> torch.dtype:
    return SIXTEEN_BITS if options.dtype is None else getattr(torch, options.dtype)
