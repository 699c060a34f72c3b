"""The options of the page, without torch and Gradio, so that a command line can show them quickly."""

from dataclasses import dataclass
from functools import partial

from nestling.config import Config, option
from nestling.options import text, whole

GRACE = 1  # seconds that answers have to be finished when the page is stopped
MOST_BYTES = 2**20  # of an uploaded file


@dataclass(frozen=True, kw_only=True)
class PlayConfig(Config):
    """Where the page is."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all networks, whoever is there.", text)
    port: int = option(7860, "Port to listen on; 0 for one that is free.", partial(whole, minimum=0, maximum=65535))
