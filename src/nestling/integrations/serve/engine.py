"""The one who generates: a line of bounded length, and a worker that answers a request at a time."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.generation.streamers import BaseStreamer

from nestling.errors import BudgetError, NestlingError, UnsupportedModelError
from nestling.integrations.serve.config import GRACE, ServeConfig
from nestling.integrations.serve.metrics import Metrics
from nestling.integrations.serve.pieces import Pieces
from nestling.integrations.serve.request import ChatRequest, RequestError
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.budget import Budget
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.factory import CacheFactory, read_request
from nestling.kv.integration.attach import cached, input_device, longest_text

logger = logging.getLogger("nestling.serve")


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: ``stop`` where the model or a stop text ended it, ``length`` where its tokens were used up.
        tokens: of the answer.
        budget: share of the full cache that was in use at the end.
        nbytes, full_nbytes: what the cache held, and what a full one would have.
    """

    reason: str
    tokens: int
    budget: float
    nbytes: int
    full_nbytes: int


@dataclass(eq=False)
class Job:
    """A request in the line or in work; its events are pieces of text, then one `Done` or one error."""

    request: ChatRequest
    inputs: dict[str, torch.Tensor]
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[-1]

    def tell(self, event: "str | Done | RequestError") -> None:
        """An event for the client, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens
            self.gone.set()


class _Enough(Exception):
    """Ends ``generate`` from within a streamer: a stop text was met, or nobody listens."""


class _Sink(BaseStreamer):
    """What ``generate`` gives its tokens to: text goes to the client, bytes to the metrics."""

    def __init__(self, job: Job, pieces: Pieces, cache: NestedCache, metrics: Metrics):
        self.job, self.pieces, self.cache, self.metrics = job, pieces, cache, metrics
        self.prompt_read = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_read:  # the first tokens are those of the prompt
            self.prompt_read = True
            return
        for token in value.flatten().tolist():
            if new := self.pieces.add(token):
                self.job.tell(new)
        self.metrics.holds(self.cache.nbytes, self.cache.full_nbytes)
        if self.pieces.stopped or self.job.gone.is_set():
            raise _Enough

    def end(self) -> None:
        pass


class Engine:
    """A model, its adapter, and the worker that answers with them.

    Args:
        model: a causal language model, loaded.
        tokenizer: its own, with a chat template.
        adapter: made for the model.
        cache: options of every request's cache; a budget in bytes is a limit that no request can lift.
        config: limits of the server.

    Raises:
        AdapterError, BudgetError: as `NestedCache`, at once.
        UnsupportedModelError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, adapter: KVAdapter, cache: CacheConfig, config: ServeConfig):
        if not tokenizer.chat_template:
            raise UnsupportedModelError(
                "the tokenizer has no chat template, so messages cannot be put to the model: serve an instruct model"
            )
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.name = model.name_or_path
        self.cache = _with_limit(cache)
        self.standard = NestedCache(model, adapter, self.cache)  # kept, since it keeps the bases that all share
        self.context = longest_text(model)
        own = model.generation_config
        ends = [] if own.eos_token_id is None else own.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends)
        self.padding = next((i for i in (own.pad_token_id, tokenizer.pad_token_id, *self.ends) if i is not None), 0)
        self.metrics = Metrics()
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._tokenizing = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="nestling-serve", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Requests that are being answered: 0 or 1."""
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether requests are answered at all."""
        return self._worker.is_alive() and not self._closed

    def prepare(self, request: ChatRequest, loop: asyncio.AbstractEventLoop) -> Job:
        """Put the messages into the model's words, and see whether there is room for an answer. Any thread may do it.

        Args:
            loop: in which the job's events are waited for.

        Raises:
            RequestError: the budget cannot be met, the template refuses the messages, or prompt and answer are longer
                than the model or the server allows.
        """
        if request.cache != self.cache:
            try:
                factory = CacheFactory(self.adapter, request.cache)
                factory.required(factory.budget)
            except BudgetError as error:
                raise RequestError(str(error), param="nestling") from error
        try:
            with self._tokenizing:
                read = self.tokenizer.apply_chat_template(
                    request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        except TemplateError as error:
            raise RequestError(f"messages: the model's template refuses them: {error}", param="messages") from error
        inputs = {name: read[name] for name in ("input_ids", "attention_mask")}
        return Job(request, inputs, self._room(request, inputs["input_ids"].shape[-1]), loop)

    def _room(self, request: ChatRequest, prompt: int) -> int:
        """How many tokens the answer may have."""
        most, asked = self.config.max_new_tokens, request.max_tokens
        if asked is not None and asked > most:
            raise RequestError(
                f"max_tokens={asked}: this server gives at most {most}; ask for fewer", param="max_tokens"
            )
        left = most if self.context is None else self.context - prompt
        if left < (asked or 1):
            wanted = f" and an answer of {asked}" if asked else ""
            raise RequestError(
                f"messages: a prompt of {prompt} tokens{wanted} does not fit the model's context of {self.context}; "
                "shorten the messages" + (" or lower max_tokens" if asked else ""),
                param="messages",
                code="context_length_exceeded",
            )
        return asked or min(most, left)

    def check_line(self) -> None:
        """See whether one more request may wait.

        Raises:
            RequestError: the line is full (429), or the server is about to stop (503).
        """
        if self._closed:
            raise _stopping()
        if (waiting := len(self._line)) + self.running > self.config.queue:
            said = f"{waiting} requests wait already, and no more may: try again in a moment"
            raise RequestError(said, 429, "rate_limit_error", code="rate_limit_exceeded")

    def submit(self, job: Job) -> None:
        """Put a job into the line.

        Raises:
            RequestError: as `check_line`.
        """
        with self._changed:
            self.check_line()
            self._line.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """The client of a job went away: it leaves the line, or its generation ends with the next token."""
        job.gone.set()
        with self._changed:
            if job in self._line:
                self._line.remove(job)
                self.metrics.ended("gone")

    def close(self) -> None:
        """Take nothing on any more, and end what is in the line and in work with an error for its client."""
        with self._changed:
            self._closed = True
            waiting, running = list(self._line), self._running
            self._line.clear()
            self._changed.notify()
        for job in (*waiting, *([] if running is None else [running])):
            job.tell(_stopping())
            job.gone.set()
        for _ in waiting:
            self.metrics.ended("failed")
        self._worker.join(GRACE)  # a prompt that is being read is not waited for longer

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                job = self._running = self._line.popleft()
            self._answer(job)

    def _answer(self, job: Job) -> None:
        """Generate, and tell the client how it ended, whatever happens."""
        outcome = "answered"
        try:
            end: Done | RequestError = self._generate(job)
        except NestlingError as error:
            outcome, end = "refused", RequestError(str(error))
        except BaseException as error:
            logger.exception("a request failed")
            outcome = "failed"
            end = RequestError(
                f"the generation failed ({type(error).__name__}); the server's log says more", 500, "server_error"
            )
        self.metrics.holds(0, 0)
        self.metrics.ended("gone" if job.gone.is_set() else outcome)
        self._running = None  # before the client knows, which may have another request
        job.tell(end)

    def _generate(self, job: Job) -> Done:
        cache = NestedCache(self.model, self.adapter, job.request.cache)
        pieces = Pieces(self.tokenizer, job.request.stop)
        inputs = {name: tensor.to(input_device(self.model)) for name, tensor in job.inputs.items()}
        start = time.perf_counter()
        try:
            with _seeded(job.request.seed, inputs["input_ids"].device):
                self.model.generate(
                    **inputs,
                    **cached(self.model, cache),
                    **job.request.sampling,
                    max_new_tokens=job.max_tokens,
                    num_beams=1,
                    pad_token_id=self.padding,
                    streamer=_Sink(job, pieces, cache, self.metrics),
                )
        except _Enough:
            pass
        finally:
            self.metrics.generated(job.prompt_tokens, len(pieces.tokens), time.perf_counter() - start)
        if rest := pieces.end():
            job.tell(rest)
        ended = pieces.stopped or bool(pieces.tokens and pieces.tokens[-1] in self.ends)
        reason = "stop" if ended else "length"
        return Done(reason, len(pieces.tokens), cache.budget, cache.nbytes, cache.full_nbytes)


def _with_limit(cache: CacheConfig) -> CacheConfig:
    """The same options with a budget in bytes as a limit, which stays when a request has a budget of its own."""
    if not isinstance(cache.budget, str | Budget) or (limit := read_request(cache)[1]) is None:
        return cache
    return replace(cache, budget=None, limit=limit)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within it random numbers follow from the seed, if there is one; afterwards they go on as before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _stopping() -> RequestError:
    return RequestError("the server is about to stop: try again later", 503, "server_error")
