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
from nestling.kv.allocation.ranks import RankTable
from nestling.kv.cache.cache import NestedCache
from nestling.kv.calibration.fit import fit
from nestling.kv.calibration.search import search
from nestling.kv.evaluation.evaluate import Contender, compare, evaluate
from nestling.kv.integration.attach import attach, detach, supports
from nestling.kv.training.train import train

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
