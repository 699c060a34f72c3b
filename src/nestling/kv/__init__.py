"""The cache wing: nested bases for keys and values, and a cache that stores their first coordinates."""

from nestling.errors import (
    AdapterError,
    BudgetError,
    CacheMismatchError,
    CalibrationError,
    GradientError,
    TrainingError,
    UnsupportedModelError,
)
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocate import RankTable
from nestling.kv.attention import attach, detach, supports
from nestling.kv.cache import NestedCache
from nestling.kv.calibrate import fit
from nestling.kv.evaluate import Contender, compare, evaluate
from nestling.kv.search import search
from nestling.kv.train import train

__all__ = [
    "AdapterError",
    "BudgetError",
    "CacheMismatchError",
    "CalibrationError",
    "Contender",
    "GradientError",
    "KVAdapter",
    "NestedCache",
    "RankTable",
    "TrainingError",
    "UnsupportedModelError",
    "attach",
    "compare",
    "detach",
    "evaluate",
    "fit",
    "search",
    "supports",
    "train",
]
