"""The cache wing: nested bases for keys and values, and a cache that stores their first coordinates."""

from nestling.checkpoints import TrainingError
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocate import BudgetError, RankTable
from nestling.kv.attention import UnsupportedModelError, attach
from nestling.kv.cache import NestedCache
from nestling.kv.calibrate import fit
from nestling.kv.evaluate import Contender, compare, evaluate
from nestling.kv.files import AdapterError
from nestling.kv.layer import CacheMismatchError
from nestling.kv.moments import CalibrationError
from nestling.kv.search import search
from nestling.kv.train import train

__all__ = [
    "AdapterError",
    "BudgetError",
    "CacheMismatchError",
    "CalibrationError",
    "Contender",
    "KVAdapter",
    "NestedCache",
    "RankTable",
    "TrainingError",
    "UnsupportedModelError",
    "attach",
    "compare",
    "evaluate",
    "fit",
    "search",
    "train",
]
