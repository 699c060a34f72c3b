"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself."""

from nestling.errors import MissingExtraError

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise MissingExtraError("nestling.embed needs sentence-transformers: pip install 'nestling[embed]'") from error

from nestling.embed.evaluation.agreement import agreement
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.evaluation.results import save_results
from nestling.embed.export.export import Exported, export
from nestling.embed.ladder import Cup, Ladder
from nestling.embed.model.folder import load_ladder, load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.model.taps import taps
from nestling.embed.pretraining.corpus import Texts
from nestling.embed.pretraining.pretrain import pretrain
from nestling.embed.training.align import align
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.train import Trained, train
from nestling.errors import (
    EvaluationError,
    ExampleError,
    ExportError,
    LadderError,
    MaskingError,
    TrainingError,
    UnsupportedEncoderError,
)

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
    "Projection",
    "StarbucksLoss",
    "Texts",
    "Trained",
    "TrainingError",
    "UnsupportedEncoderError",
    "agreement",
    "align",
    "export",
    "load_encoder",
    "load_ladder",
    "load_projections",
    "pretrain",
    "fit_projections",
    "save_results",
    "taps",
    "train",
]
