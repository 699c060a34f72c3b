"""The routes: chat completions, models, metrics and health. Every error has OpenAI's shape."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from nestling.errors import NestlingError
from nestling.integrations.serve.config import MOST_BYTES
from nestling.integrations.serve.engine import Done, Engine, Job
from nestling.integrations.serve.replies import Reply, failure
from nestling.integrations.serve.request import RequestError, read_request

CLIENT_GONE = 499  # as nginx logs it; nobody reads it


class _Json(JSONResponse):
    """JSON in ASCII: text that came from outside may hold what UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class Application:
    """The web side of an engine.

    Args:
        engine: it is closed when the application ends.
    """

    def __init__(self, engine: Engine):
        self.engine, self.created = engine, int(time.time())

    def build(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/metrics", self.metrics),
            Route("/health", self.health),
        ]
        handlers: dict[Any, Any] = {NestlingError: _refused, HTTPException: _no_such, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)

    async def chat(self, request: Request) -> Response:
        """Answer messages, whole or as a stream."""
        try:
            body = await _body(request)
            asked = read_request(body, self.engine.name, self.engine.cache)
            self.engine.check_line()  # those who cannot wait are told so before their text is looked at
            job = await asyncio.to_thread(self.engine.prepare, asked, asyncio.get_running_loop())
            self.engine.submit(job)
        except ClientDisconnect:
            self.engine.metrics.ended("gone")
            return Response(status_code=CLIENT_GONE)
        except NestlingError as error:
            self.engine.metrics.ended("busy" if getattr(error, "status", 400) in (429, 503) else "refused")
            raise
        except Exception:
            self.engine.metrics.ended("failed")
            raise
        reply = Reply(job, self.engine.name)
        if asked.stream:
            first = await self._while_there(request, job, job.events.get())
            if isinstance(first, RequestError):
                raise first
            if first is None:
                return Response(status_code=CLIENT_GONE)
            return StreamingResponse(
                self._stream(job, reply, first),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(self.engine.leave, job),  # where the stream was never begun
            )
        whole = await self._while_there(request, job, _whole(job))
        if whole is None:
            return Response(status_code=CLIENT_GONE)
        return _Json(reply.whole(*whole))

    async def _while_there(self, request: Request, job: Job, result: Any) -> Any:
        """What an awaitable gives, or None if the client goes away before."""
        waiting, leaving = asyncio.ensure_future(result), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            if not waiting.done():
                self.engine.leave(job)
            for task in (waiting, leaving):
                task.cancel()

    async def _stream(self, job: Job, reply: Reply, event: Any) -> AsyncIterator[str]:
        try:
            yield reply.first()
            while isinstance(event, str):
                yield reply.piece(event)
                event = await job.events.get()
            yield failure(event) if isinstance(event, RequestError) else reply.last(event)
        finally:
            self.engine.leave(job)

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        return _Json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model by its name."""
        if request.path_params["name"] != self.engine.name:
            raise RequestError(
                f"model {request.path_params['name']!r} is not served here: expected {self.engine.name!r}",
                404,
                param="model",
                code="model_not_found",
            )
        return _Json(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.engine.name, "object": "model", "created": self.created, "owned_by": "nestling"}

    async def metrics(self, request: Request) -> Response:
        """Counts and bytes, for Prometheus."""
        text = self.engine.metrics.text(self.engine.waiting, self.engine.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        alive = self.engine.alive
        return _Json({"status": "ok" if alive else "stopped"}, 200 if alive else 503)


async def _body(request: Request) -> bytes:
    """The body, of no more than `MOST_BYTES`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise RequestError(f"the body has more than {MOST_BYTES} bytes: shorten the messages", 413)
    return bytes(body)


async def _whole(job: Job) -> tuple[str, Done]:
    """All text of a job, and how it ended.

    Raises:
        RequestError: it failed.
    """
    pieces: list[str] = []
    while isinstance(event := await job.events.get(), str):
        pieces.append(event)
    if isinstance(event, RequestError):
        raise event
    return "".join(pieces), event


async def _disconnected(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, RequestError) else RequestError(str(error))
    headers = {"Retry-After": "1"} if refused.status in (429, 503) else None
    return _Json(refused.to_dict(), refused.status, headers)


async def _no_such(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    return _Json(RequestError(said).to_dict(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    said = f"the server failed ({type(error).__name__}); its log says more"
    return _Json(RequestError(said, 500, "server_error").to_dict(), 500)
