"""The embedding wing: text encoders whose every size, in layers and in coordinates, is good by itself.

Its names are imported when they are asked for: sentence-transformers is an optional extra.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Cup": "nestling.ladder",
    "Ladder": "nestling.ladder",
    "LadderError": "nestling.ladder",
    "Rotation": "nestling.embed.rotation",
    "StarbucksLoss": "nestling.embed.losses",
    "UnsupportedEncoderError": "nestling.embed.encoder",
    "rotations": "nestling.embed.rotation",
    "taps": "nestling.embed.taps",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """The public names, and the reason where the extra is missing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nestling.embed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
