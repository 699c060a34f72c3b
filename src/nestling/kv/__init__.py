"""The cache wing: nested bases for keys and values, and a cache that stores their first coordinates.

Names are imported when they are asked for, so that the command line can read options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestling.errors import (
    AdapterError,
    BudgetError,
    CacheMismatchError,
    CalibrationError,
    GradientError,
    TrainingError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter
    from nestling.kv.allocation.table import Allocation
    from nestling.kv.cache.bound import bound
    from nestling.kv.cache.cache import NestedCache
    from nestling.kv.cache.config import CacheConfig
    from nestling.kv.calibration.config import FitConfig, SearchConfig
    from nestling.kv.calibration.fit import fit
    from nestling.kv.calibration.search import search
    from nestling.kv.evaluation.config import EvalConfig
    from nestling.kv.evaluation.evaluate import Candidate, compare, evaluate
    from nestling.kv.evaluation.scoring import Score, score
    from nestling.kv.integration.attach import attach, detach, supports
    from nestling.kv.training.config import TrainConfig
    from nestling.kv.training.train import train

__all__ = [
    "AdapterError",
    "Allocation",
    "BudgetError",
    "CacheConfig",
    "CacheMismatchError",
    "CalibrationError",
    "Candidate",
    "EvalConfig",
    "FitConfig",
    "GradientError",
    "KVAdapter",
    "NestedCache",
    "Score",
    "SearchConfig",
    "TrainConfig",
    "TrainingError",
    "UnsupportedModelError",
    "attach",
    "bound",
    "compare",
    "detach",
    "evaluate",
    "fit",
    "score",
    "search",
    "supports",
    "train",
]
HOMES = {
    "KVAdapter": "adapter",
    "Allocation": "allocation.table",
    "CacheConfig": "cache.config",
    "NestedCache": "cache.cache",
    **dict.fromkeys(("FitConfig", "SearchConfig"), "calibration.config"),
    "bound": "cache.bound",
    "fit": "calibration.fit",
    "search": "calibration.search",
    **dict.fromkeys(("Candidate", "compare", "evaluate"), "evaluation.evaluate"),
    **dict.fromkeys(("Score", "score"), "evaluation.scoring"),
    **dict.fromkeys(("attach", "detach", "supports"), "integration.attach"),
    "EvalConfig": "evaluation.config",
    "TrainConfig": "training.config",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value
