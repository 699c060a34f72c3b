"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself.

Names are imported when they are asked for, so that the command line can read options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestling.errors import (
    EncodeError,
    EvaluationError,
    ExampleError,
    ExportError,
    LadderError,
    MaskingError,
    MissingExtraError,
    SearchError,
    TrainingError,
    UnsupportedEncoderError,
)

if TYPE_CHECKING:
    from nestling.embed.adapter import ElasticAdapter
    from nestling.embed.corpus.config import EncodeConfig
    from nestling.embed.corpus.encode import encode_corpus
    from nestling.embed.corpus.vectors import Vectors
    from nestling.embed.elastic import ElasticEncoder
    from nestling.embed.evaluation.evaluator import GridEvaluator
    from nestling.embed.evaluation.results import save_results
    from nestling.embed.export.export import Exported
    from nestling.embed.model.projection import Projection
    from nestling.embed.pretraining.config import PretrainConfig
    from nestling.embed.pretraining.corpus import Texts
    from nestling.embed.search.choose import choose_plan
    from nestling.embed.search.config import PlanConfig
    from nestling.embed.search.flat import FlatIndex
    from nestling.embed.search.index import Hit, Index
    from nestling.embed.search.plan import Plan
    from nestling.embed.training.config import LossConfig, TrainConfig
    from nestling.embed.training.loss import StarbucksLoss

__all__ = [
    "ElasticAdapter",
    "ElasticEncoder",
    "EncodeConfig",
    "EncodeError",
    "EvaluationError",
    "ExampleError",
    "ExportError",
    "Exported",
    "FlatIndex",
    "GridEvaluator",
    "Hit",
    "Index",
    "LadderError",
    "LossConfig",
    "MaskingError",
    "Plan",
    "PlanConfig",
    "PretrainConfig",
    "Projection",
    "SearchError",
    "StarbucksLoss",
    "Texts",
    "TrainConfig",
    "TrainingError",
    "UnsupportedEncoderError",
    "Vectors",
    "choose_plan",
    "encode_corpus",
    "save_results",
]
HOMES = {
    "ElasticAdapter": "adapter",
    "ElasticEncoder": "elastic",
    "EncodeConfig": "corpus.config",
    "Exported": "export.export",
    "FlatIndex": "search.flat",
    "GridEvaluator": "evaluation.evaluator",
    "Hit": "search.index",
    "Index": "search.index",
    "LossConfig": "training.config",
    "Plan": "search.plan",
    "PlanConfig": "search.config",
    "PretrainConfig": "pretraining.config",
    "Projection": "model.projection",
    "StarbucksLoss": "training.loss",
    "Texts": "pretraining.corpus",
    "TrainConfig": "training.config",
    "Vectors": "corpus.vectors",
    "choose_plan": "search.choose",
    "encode_corpus": "corpus.encode",
    "save_results": "evaluation.results",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(f"{__name__}.{HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise MissingExtraError("nestling.embed needs sentence-transformers: pip install 'nestling[embed]'") from error
    value = globals()[name] = getattr(home, name)
    return value
