"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself."""

from nestling.errors import MissingExtraError

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise MissingExtraError("nestling.embed needs sentence-transformers: pip install 'nestling[embed]'") from error

from nestling.embed.agreement import agreement
from nestling.embed.align import align
from nestling.embed.corpus import Texts
from nestling.embed.evaluate import GridEvaluator
from nestling.embed.export import Exported, export
from nestling.embed.files import load_ladder, load_rotations
from nestling.embed.load import load_encoder
from nestling.embed.losses import StarbucksLoss
from nestling.embed.pretrain import pretrain
from nestling.embed.results import save_results
from nestling.embed.rotation import Rotation, rotations
from nestling.embed.taps import taps
from nestling.embed.train import Trained, train
from nestling.errors import (
    EvaluationError,
    ExampleError,
    ExportError,
    LadderError,
    MaskingError,
    TrainingError,
    UnsupportedEncoderError,
)
from nestling.ladder import Cup, Ladder

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
    "Rotation",
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
    "load_rotations",
    "pretrain",
    "rotations",
    "save_results",
    "taps",
    "train",
]
