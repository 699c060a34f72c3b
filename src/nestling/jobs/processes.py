"""How many processes work together, and which one this is, as torchrun and other launchers say."""

import os


def processes() -> int:
    """How many processes train together: ``WORLD_SIZE``."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process among them, from 0 on: ``RANK``. The first one speaks and writes for all."""
    return int(os.environ.get("RANK", 0))
