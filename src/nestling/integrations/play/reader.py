"""The cache side of the page: a document that is read once, questions to it, and its cache made smaller in place.

The document stands in the model's chat template where the user speaks, the question after it. What is before the
question is read once by a stock cache and once by a nested one; a question is read by copies of them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from nestling.errors import OptionError
from nestling.kv.adapter import KVAdapter
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.document import continuation, read
from nestling.kv.integration.attach import longest_text, text_config

ANSWER = 48  # tokens of an answer at most
MARKS = ("\u241fdocument\u241f", "\u241fquestion\u241f")  # where they stand in a template
UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character


@dataclass(eq=False)
class Reading:
    """A document that was read.

    Attributes:
        document, asked: the text, and the budget that the nested cache was made with, in percent.
        tokens: that both caches hold.
        full, nested: the stock cache, and the nested one, which is the live one that is shrunk.
        seconds: that reading took, by the stock cache and by the nested one.
    """

    document: str
    asked: float
    tokens: int
    full: Cache
    nested: NestedCache
    seconds: tuple[float, float]

    @property
    def percent(self) -> float:
        """The budget of the live cache, in percent of the full one."""
        return 100 * self.nested.budget


@dataclass(frozen=True)
class Said:
    """An answer so far: its text, and milliseconds a token after the first."""

    text: str
    milliseconds: float | None = None


class Reader:
    """A model with its adapter, which reads documents and answers questions.

    Args:
        name: that the model is shown by.
        model: a causal language model, loaded.
        tokenizer: its own; without a chat template, documents and questions are put to it as plain text.
        adapter: made for the model.

    Raises:
        AdapterError: the adapter is of another model.
        BudgetError: it cannot be cut to the default budget.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, adapter: KVAdapter):
        self.name, self.model, self.tokenizer, self.adapter = name, model, tokenizer, adapter
        self.standard = NestedCache(model, adapter)  # kept, since it keeps the bases that caches of its budget share
        self.context = longest_text(model)
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        template = self._template()
        self.before, self.between, self.after = template or ("", "\n\nQuestion: ", "\nAnswer:")
        self.special = template is None  # templates bring their special tokens themselves

    def _template(self) -> list[str] | None:
        """What a chat puts before the document, between it and the question, and before the answer."""
        if not self.tokenizer.chat_template:
            return None
        message = [{"role": "user", "content": "\n\n".join(MARKS)}]
        try:
            text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except TemplateError:
            return None
        before, document, rest = text.partition(MARKS[0])
        between, question, after = rest.partition(MARKS[1])
        return [before, between, after] if document and question else None

    def read(self, document: str, percent: float) -> Reading:
        """Read a document, by a stock cache and by a nested one of that budget.

        Raises:
            OptionError: there is no text, or more than the model takes.
            BudgetError: the budget is out of reach; the message has the smallest one.
        """
        if not document.strip():
            raise OptionError("the document is empty: paste a text, or take the built-in one")
        ids = self._ids(self.before + document, self.special)
        tokens = ids.shape[1]
        self._check(tokens)
        config = CacheConfig(budget=f"{percent:g}%", context=tokens)
        nested, full = NestedCache(self.model, self.adapter, config), DynamicCache(config=text_config(self.model))
        seconds = (self._timed(ids, full), self._timed(ids, nested))
        return Reading(document, percent, tokens, full, nested, seconds)

    def answer(self, reading: Reading, cache: Cache, question: str) -> Iterator[Said]:
        """The answer by a copy of one of the reading's caches, as it grows.

        Raises:
            OptionError: the question is empty, or too long.
        """
        if not question.strip():
            raise OptionError("the question is empty: ask something that the document answers")
        ids = self._ids(self.between + question.strip() + self.after, False)
        self._check(reading.tokens + ids.shape[1] + ANSWER)
        tokens: list[int] = []
        start = time.perf_counter()
        for token in continuation(self.model, ids, cache, ANSWER, self.ends):
            tokens.append(token)
            if len(tokens) == 1:
                start = time.perf_counter()
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            spent = 1e3 * (time.perf_counter() - start)
            yield Said(text.strip(f"{UNFINISHED}\n "), spent / (len(tokens) - 1) if len(tokens) > 1 else None)

    def shrink(self, reading: Reading, percent: float) -> float:
        """Make the live cache smaller, in place; nothing is read again.

        Returns:
            Milliseconds that it took.

        Raises:
            BudgetError: the budget is larger than the one in use, or out of reach; nothing has changed.
        """
        start = time.perf_counter()
        reading.nested.shrink(f"{percent:g}%")
        return 1e3 * (time.perf_counter() - start)

    def _ids(self, text: str, special: bool) -> Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False)["input_ids"]

    def _check(self, tokens: int) -> None:
        """See whether the model takes so many, with a question and an answer.

        Raises:
            OptionError: it does not.
        """
        if self.context is not None and tokens > self.context:
            raise OptionError(
                f"{tokens:,} tokens are more than {self.name} takes, {self.context:,}: shorten the document"
            )

    def _timed(self, ids: Tensor, cache: Cache) -> float:
        start = time.perf_counter()
        read(self.model, ids, cache)
        return time.perf_counter() - start
