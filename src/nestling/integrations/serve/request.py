"""What a client sends to ``/v1/chat/completions``, read and checked: what cannot be done is refused, not left out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nestling.errors import NestlingError, OptionError
from nestling.kv.cache.config import CacheConfig
from nestling.options import flag, number, shown, text, whole

ROLES = ("system", "developer", "user", "assistant")
MOST_STOPS = 4
# Of no consequence for the text of an answer.
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# Not served, unless the value asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
READ = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
    "stream_options", "nestling",
}  # fmt: skip


class RequestError(NestlingError):
    """A request that is not answered.

    Args:
        message: what was sent, what was expected, what to do.
        status: of HTTP: 4xx where the client can do something about it.
        kind: OpenAI's word for errors of a status.
        param: the field of the request.
        code: OpenAI's word for this error, where it has one.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered.

    Attributes:
        messages: with ``role`` and ``content``, as chat templates read them.
        max_tokens: of the answer, or None for as many as the server allows.
        sampling: arguments of ``generate``; empty for what the model's own generation config says.
        stop: texts that end the answer and are no part of it.
        cache: options of its cache.
    """

    messages: list[dict[str, str]]
    cache: CacheConfig
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_request(body: bytes, model: str, cache: CacheConfig) -> ChatRequest:
    """The request in the body of a POST.

    Args:
        model: the name of the model that is served.
        cache: the server's options, of which a request may change the budget.

    Raises:
        RequestError: it is no JSON object, names another model, or has a value that cannot be or is not served.
    """
    fields = _object(body)
    try:
        return _read(fields, model, cache)
    except OptionError as error:
        raise RequestError(str(error), param=str(error).partition("=")[0] if "=" in str(error) else None) from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the body is {shown(fields)}: expected a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _read(fields: dict[str, Any], model: str, cache: CacheConfig) -> ChatRequest:
    asked = text("model", fields.get("model"))
    if asked != model:
        raise RequestError(
            f"model={shown(asked)} is not served here: expected {model!r}", 404, param="model", code="model_not_found"
        )
    _check_names(fields)
    lengths = [whole(name, fields[name]) for name in ("max_completion_tokens", "max_tokens") if name in fields]
    stream = flag("stream", fields.get("stream", False))
    return ChatRequest(
        messages=_messages(fields.get("messages")),
        cache=_cache(fields.get("nestling", {}), cache),
        max_tokens=min(lengths, default=None),
        sampling=_sampling(fields),
        seed=whole("seed", fields["seed"], 0, 2**63 - 1) if "seed" in fields else None,
        stop=_stop(fields.get("stop", [])),
        stream=stream,
        include_usage=stream and _include_usage(fields.get("stream_options", {})),
    )


def _check_names(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in READ or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL:
            said = f"{name}={shown(value)} is not served: expected {shown(NEUTRAL[name][0])} or nothing"
        else:
            said = f"{shown(name)} is not served: leave it out"
        raise RequestError(said, param=name[:60], code="unsupported_parameter")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise OptionError(f"messages={shown(value)}: expected a list with at least one message")
    messages = []
    for place, message in enumerate(value):
        name = f"messages[{place}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise OptionError(f"{name}={shown(message)}: expected an object with a role of {', '.join(ROLES)}")
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": _content(f"{name}.content", message.get("content"))})
    return messages


def _content(name: str, value: Any) -> str:
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise OptionError(f"{name}={shown(value)}: expected a string, or parts of type text")
    content = "".join(part["text"] for part in parts)
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can spell
        raise OptionError(f"{name}={shown(content)}: expected Unicode text ({error.reason})") from error
    return content


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if "temperature" in fields:
        chosen["temperature"] = number("temperature", fields["temperature"], minimum=0.0, maximum=2.0)
    if "top_p" in fields:
        chosen["top_p"] = number("top_p", fields["top_p"], above=0.0, maximum=1.0)
    if chosen.get("temperature") == 0:
        return {"do_sample": False}
    return {"do_sample": True, **chosen} if chosen else {}


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise OptionError(f"stop={shown(value)}: expected a text, or a list of at most {MOST_STOPS}, none empty")
    return tuple(stops)


def _include_usage(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise OptionError(f"stream_options={shown(value)}: expected an object with include_usage")
    return flag("stream_options.include_usage", value.get("include_usage", False))


def _cache(value: Any, cache: CacheConfig) -> CacheConfig:
    if not isinstance(value, dict) or set(value) - {"budget"}:
        raise OptionError(f"nestling={shown(value)}: expected an object with a budget")
    if (budget := value.get("budget")) is None:
        return cache
    if not isinstance(budget, str | int | float):  # the library also takes allocations, which are the adapter's
        raise OptionError(f"budget={shown(budget)}: expected a share such as 0.25 or '25%'")
    return replace(cache, budget=budget)
