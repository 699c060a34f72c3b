"""Answers in OpenAI's shapes: whole, or in chunks as server-sent events."""

import json
import time
import uuid
from typing import Any

from nestling.integrations.serve.engine import Done, Job
from nestling.integrations.serve.request import RequestError

END = "data: [DONE]\n\n"


class Reply:
    """The answer to one job.

    Args:
        model: its name, as the request has it.
    """

    def __init__(self, job: Job, model: str):
        self.job, self.model = job, model
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, content: str, done: Done) -> dict[str, Any]:
        """A chat completion."""
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
        return self._named("chat.completion", [choice]) | {"usage": self._usage(done), "nestling": _held(done)}

    def first(self) -> str:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, content: str) -> str:
        """A chunk with text."""
        return self._chunk({"content": content})

    def last(self, done: Done) -> str:
        """The chunk that says why the answer ended, that of the usage if it was asked for, and the end mark."""
        chunk = self._chunk({}, done.reason, nestling=_held(done))
        if self.job.request.include_usage:
            chunk += event(self._named("chat.completion.chunk", []) | {"usage": self._usage(done)})
        return chunk + END

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event(self._named("chat.completion.chunk", [choice]) | more)

    def _named(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self, done: Done) -> dict[str, int]:
        prompt = self.job.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": done.tokens, "total_tokens": prompt + done.tokens}


def event(data: dict[str, Any]) -> str:
    """A server-sent event, in ASCII: some clients take other characters for the ends of lines."""
    return f"data: {json.dumps(data)}\n\n"


def failure(error: RequestError) -> str:
    """The event by which OpenAI's clients know that a stream has failed."""
    return event(error.to_dict())


def _held(done: Done) -> dict[str, Any]:
    return {"budget": done.budget, "cache_bytes": done.nbytes, "full_cache_bytes": done.full_nbytes}
