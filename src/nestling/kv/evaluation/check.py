"""What a new adapter's caches lose, measured on text that it was not made from, beside what its costs predict.

It is what a card says, and what tells whether an allocation can be trusted: bits go where losses are predicted to be
large.
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from nestling.errors import BudgetError, TextTooShortError
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.allocate import predicted
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.factory import planned
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import evaluate
from nestling.kv.integration.attach import longest_text

BUDGETS = (0.3125, 0.25, 0.1875, 0.125, 0.0625)
LENGTH, WINDOWS = 2048, 1
CHUNK = 256  # what a query sees of our caches does not depend on it
COLUMNS = {
    "budget": "budget", "bytes_share": "of bf16", "predicted": "predicted", "kl": "KL", "kl_99": "KL 99%",
    "kl_first": "KL, start", "kl_last": "KL, end",
}  # fmt: skip


def expected(adapter: KVAdapter, share: float, allocation: Allocation) -> float:
    """The KL in nats per token that caches of a share of the bytes are expected to cost: what is predicted, times what
    the measured ones among ``info["measured"]`` were off by at the budgets around it. Above the largest of these it is
    that one's KL, a bound: what recent tokens at 8 bits cost, which is most there, is not predicted."""
    rows = [row for row in adapter.info.get("measured", {}).get("rows", []) if row.get("predicted", 0) > 0 < row["kl"]]
    rows.sort(key=lambda row: row["budget"])
    loss = predicted(adapter, allocation)
    if not rows:
        return loss
    if share > rows[-1]["budget"]:
        return rows[-1]["kl"]
    off = [math.log(row["kl"] / row["predicted"]) for row in rows]
    return loss * math.exp(float(np.interp(math.log(share), [math.log(row["budget"]) for row in rows], off)))


def checked(model, tokenizer, texts: Iterable[str] | None, adapter: KVAdapter, *, progress: bool = True) -> KVAdapter:
    """The adapter with ``info["measured"]``: ``length``, ``windows``, and rows of `COLUMNS` at five budgets.

    Args:
        texts: held out from what it was made of; if there is no window of 2,048 tokens, or for None, the built-in
            English pages are read.

    Raises:
        EvaluationError: for logits that are not finite.
    """
    length = min(LENGTH, longest_text(model) or LENGTH)
    plans: dict[float, Any] = {}
    for budget in BUDGETS:
        with contextlib.suppress(BudgetError):  # heads so narrow that so little cannot be kept
            plans[budget] = planned(adapter, CacheConfig(budget=budget, context=length))
    if not plans:
        return adapter
    config = EvalConfig(budgets=tuple(plans), windows=WINDOWS, length=length, chunk=CHUNK)
    try:
        rows = evaluate(model, tokenizer, texts, adapter, config, progress=progress)
    except TextTooShortError:
        rows = evaluate(model, tokenizer, None, adapter, config, progress=progress)
    measured = [{name: row[name] for name in COLUMNS if name in row} for row in rows[1:]]
    if adapter.quantises:
        measured = [row | {"predicted": predicted(adapter, plans[row["budget"]].allocation)} for row in measured]
    return replace(
        adapter, info={**adapter.info, "measured": {"length": length, "windows": WINDOWS, "rows": measured}}
    )
