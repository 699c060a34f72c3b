"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself.

Names are imported when they are asked for, so that the command line can read options without torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nestling.errors import (
    EvaluationError,
    ExampleError,
    ExportError,
    LadderError,
    MaskingError,
    MissingExtraError,
    TrainingError,
    UnsupportedEncoderError,
)

if find_spec("sentence_transformers") is None:
    raise MissingExtraError("nestling.embed needs sentence-transformers: pip install 'nestling[embed]'")
if TYPE_CHECKING:
    from nestling.embed.evaluation.agreement import agreement
    from nestling.embed.evaluation.evaluator import GridEvaluator
    from nestling.embed.evaluation.results import save_results
    from nestling.embed.export.export import Exported, export
    from nestling.embed.ladder import Cup, Ladder
    from nestling.embed.model.folder import load_ladder, load_projections
    from nestling.embed.model.loading import load_encoder
    from nestling.embed.model.projection import Projection, fit_projections
    from nestling.embed.model.taps import taps
    from nestling.embed.pretraining.config import PretrainConfig
    from nestling.embed.pretraining.corpus import Texts
    from nestling.embed.pretraining.pretrain import pretrain
    from nestling.embed.training.align import align
    from nestling.embed.training.loss import StarbucksLoss
    from nestling.embed.training.train import Trained, train

__all__ = [
    "Cup",
    "EvaluationError",
    "ExampleError",
    "ExportError",
    "Exported",
    "GridEvaluator",
    "Ladder",
    "LadderError",
    "MaskingError",
    "PretrainConfig",
    "Projection",
    "StarbucksLoss",
    "Texts",
    "Trained",
    "TrainingError",
    "UnsupportedEncoderError",
    "agreement",
    "align",
    "export",
    "fit_projections",
    "load_encoder",
    "load_ladder",
    "load_projections",
    "pretrain",
    "save_results",
    "taps",
    "train",
]
HOMES = {
    "agreement": "evaluation.agreement",
    "GridEvaluator": "evaluation.evaluator",
    "save_results": "evaluation.results",
    **dict.fromkeys(("Exported", "export"), "export.export"),
    **dict.fromkeys(("Cup", "Ladder"), "ladder"),
    **dict.fromkeys(("load_ladder", "load_projections"), "model.folder"),
    "load_encoder": "model.loading",
    **dict.fromkeys(("Projection", "fit_projections"), "model.projection"),
    "taps": "model.taps",
    "PretrainConfig": "pretraining.config",
    "Texts": "pretraining.corpus",
    "pretrain": "pretraining.pretrain",
    "align": "training.align",
    "StarbucksLoss": "training.loss",
    **dict.fromkeys(("Trained", "train"), "training.train"),
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Wing(ModuleType):
    """The function ``export`` wins over the folder of its name, whenever that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Wing
