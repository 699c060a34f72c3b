"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself."""

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ImportError("nestling.embed needs sentence-transformers: pip install 'nestling[embed]'") from error

from nestling.embed.encoder import UnsupportedEncoderError
from nestling.embed.losses import StarbucksLoss
from nestling.embed.rotation import Rotation, rotations
from nestling.embed.taps import taps
from nestling.ladder import Cup, Ladder, LadderError

__all__ = [
    "Cup",
    "Ladder",
    "LadderError",
    "Rotation",
    "StarbucksLoss",
    "UnsupportedEncoderError",
    "rotations",
    "taps",
]
