"""A server that listens: until it is stopped, or in a thread for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nestling.integrations.libraries import library
from nestling.integrations.listening import in_a_thread, listening
from nestling.integrations.serve.config import GRACE, ServeConfig
from nestling.kv.cache.config import CacheConfig


class Listener:
    """A place to listen, taken before a model is loaded; nobody is answered until it serves.

    Args:
        config: its host and port.

    Attributes:
        url: of the API, as clients want it.

    Raises:
        OptionError: the host cannot be found, or the port is in use or not allowed.
        MissingExtraError: Starlette or uvicorn is not installed.
    """

    def __init__(self, config: ServeConfig):
        self.uvicorn = library("uvicorn", "serve")
        library("starlette", "serve")
        self.config = config
        self.socket, address = listening(config.host, config.port)
        self.url = f"{address}/v1"

    def server(self, engine: Any, log_level: str = "info") -> Any:
        """A uvicorn server of an engine, which is closed when the server ends."""
        from nestling.integrations.serve.app import Application

        app = Application(engine).build()
        config = self.uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=GRACE)
        return self.uvicorn.Server(config)


@contextmanager
def serving(
    model: Any, tokenizer: Any, adapter: Any, cache: CacheConfig | None = None, config: ServeConfig | None = None
) -> Iterator[str]:
    """A server in a thread, for as long as the block lasts: for notebooks and tests.

    The model is left as it was found.

    Args:
        model: a causal language model, loaded.
        tokenizer: its own, with a chat template.
        adapter: made for the model.
        cache: options of every request's cache.
        config: where to listen, and limits. Default: a free port of this machine.

    Yields:
        The base URL for clients.

    Raises:
        OptionError: cannot listen there.
        AdapterError, BudgetError, UnsupportedModelError: as `Engine`.
        MissingExtraError: Starlette or uvicorn is not installed.
    """
    listener = Listener(ServeConfig(port=0) if config is None else config)
    from nestling.integrations.serve.engine import Engine
    from nestling.kv.integration.state import as_found

    with as_found(model), listener.socket:
        server = listener.server(Engine(model, tokenizer, adapter, CacheConfig.of(cache), listener.config), "warning")
        with in_a_thread(server, listener.socket, "nestling-server"):
            yield listener.url
