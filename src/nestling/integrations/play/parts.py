"""Parts of the page as HTML: a line that says what goes on, answers, bars, results. Their looks are in page.css.

All text is escaped, and control characters in it are spelled out.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import jinja2

from nestling.errors import NestlingError
from nestling.integrations.play.sessions import Session, Sessions
from nestling.report.page import environment

logger = logging.getLogger("nestling.play")


@dataclass(frozen=True)
class Bar:
    """A bar: its name, what stands beside it, its length as a share of 1, its colour (full, nested or bases)."""

    name: str
    detail: str
    share: float
    kind: str


@cache
def _template() -> jinja2.Template:
    return environment("nestling.integrations.play").get_template("parts.html.jinja")


def html(part: str, **values: Any) -> str:
    """A part by its name in the template."""
    return _template().render(part=part, **values)


def line(text: str, kind: str = "said") -> str:
    """A line of plain words; ``kind`` is ``said``, ``working`` or ``error``."""
    return html("line", text=" ".join(text.split()), kind=kind)


def size_of(nbytes: float) -> str:
    """Bytes as people read them, in binary units."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.1f} KiB"
    return f"{nbytes / 2**20:.2f} MiB"


def shows(*names: str) -> Callable:
    """Make a handler of a method that changes ``session.shown`` and yields whenever there is something to see.

    The method takes the session and the event's values. The handler takes Gradio's request and the values, and yields
    the named parts each time. An error is shown as one line in the first of them; the others stay.
    """

    def change(method: Callable[..., Iterator[None]]) -> Callable[..., Iterator[tuple[str, ...]]]:
        @wraps(method)
        def handler(self: Any, request: Any, *values: Any) -> Iterator[tuple[str, ...]]:
            sessions: Sessions = self.sessions
            session: Session = sessions.of(request)
            session.shown = self.empty() | session.shown
            try:
                for _ in method(self, session, *values):
                    yield tuple(session.shown[name] for name in names)
            except Exception as error:
                session.shown[names[0]] = line(_said(error), "error")
                yield tuple(session.shown[name] for name in names)

        return handler

    return change


def _said(error: Exception) -> str:
    """What a visitor is told of an error; what is not the visitor's is in the terminal, with where it happened."""
    if isinstance(error, NestlingError):
        return str(error)
    logger.error("the page", exc_info=error)
    return f"this went wrong ({type(error).__name__}); the terminal says more"


def of_page(gradio: Any, handler: Callable[..., Iterator[tuple[str, ...]]]) -> Callable:
    """A handler as Gradio takes it, which passes the request by a parameter's annotation."""

    def event(request, *values):
        yield from handler(request, *values)

    event.__annotations__ = {"request": gradio.Request}
    return event
