"""The options of a server, without torch and web libraries, so that a command line can show them quickly."""

from dataclasses import dataclass
from functools import partial

from nestling.config import Config, option
from nestling.options import natural, text, whole

MOST_BYTES = 16 * 2**20  # of a request's body
GRACE = 10  # seconds that answers have to be finished when the server is stopped


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Where a server listens, and what it takes on."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all networks, whoever is there.", text)
    port: int = option(8000, "Port to listen on; 0 for one that is free.", partial(whole, minimum=0, maximum=65535))
    max_new_tokens: int = option(1024, "Tokens of an answer at most; a request may ask for fewer.", whole)
    queue: int = option(32, "Requests that may wait while one is answered; the others are told to come back.", natural)
