"""The page, served: until it is stopped, or in a thread for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nestling.integrations.libraries import library
from nestling.integrations.listening import in_a_thread, listening
from nestling.integrations.play.config import GRACE, MOST_BYTES, PlayConfig

# A browser loads what this server gives, and asks nobody else.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-src 'none'; object-src 'none'"
)


class Player:
    """A place to listen, taken before models are loaded; nobody sees a page until it is served.

    Args:
        config: its host and port.

    Attributes:
        url: of the page.

    Raises:
        OptionError: the host cannot be found, or the port is in use or not allowed.
        MissingExtraError: Gradio is not installed.
    """

    def __init__(self, config: PlayConfig):
        library("gradio", "play")
        self.socket, self.url = listening(config.host, config.port)

    def server(self, page: Any, log_level: str = "warning") -> Any:
        """A uvicorn server of a `Page`."""
        uvicorn, fastapi, gradio = (library(name, "play") for name in ("uvicorn", "fastapi", "gradio"))
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page.blocks, "/", footer_links=[],
            run_history=False, ssr_mode=False, show_error=False, max_file_size=MOST_BYTES, **page.looks(),
        )  # fmt: skip
        config = uvicorn.Config(_Guarded(app), log_level=log_level, timeout_graceful_shutdown=GRACE)
        return uvicorn.Server(config)


class _Guarded:
    """An ASGI application whose answers carry `POLICY`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


@contextmanager
def playing(page: Any, config: PlayConfig | None = None) -> Iterator[str]:
    """A page in a thread, for as long as the block lasts: for notebooks and tests.

    Args:
        page: a `Page`.
        config: where to listen. Default: a free port of this machine.

    Yields:
        The URL of the page.

    Raises:
        OptionError: cannot listen there.
    """
    player = Player(PlayConfig(port=0) if config is None else config)
    with player.socket:
        server = player.server(page)
        with in_a_thread(server, player.socket, "nestling-play"):
            yield player.url
