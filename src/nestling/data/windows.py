"""Texts to windows of token ids. Shared by both wings."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nestling.data.jsonl import check_text, short
from nestling.data.memory import rows_of
from nestling.data.rows import texts_of
from nestling.errors import DataError, OptionError, TextTooShortError
from nestling.losses import IGNORED


def token_windows(tokenizer, texts: Iterable[str] | Tensor, length: int, limit: int | None = None) -> Iterator[Tensor]:
    """Windows of exactly ``length`` token ids, ``[length]`` int64 each: texts are packed, with EOS between them.

    Args:
        tokenizer: a transformers tokenizer; may be None when ``texts`` are token ids.
        texts: strings, or rows with a column ``text``, in a list, a data frame, a data set or any iterable; or token
            ids ``[n, T]``: rows of ids are cut into windows and never joined.
        length: tokens per window.
        limit: stop after this many windows.

    Raises:
        TextTooShortError: if there is not a single whole window.
        ValueError: if ids are not an integer tensor ``[n, T]``, or ``texts`` is one string, or ``length`` is below 1.
    """
    if length < 1:
        raise OptionError(f"length must be at least 1 token, got {length}")
    made = 0
    for window in _windows(tokenizer, texts, length):
        yield window
        made += 1
        if made == limit:
            return
    if not made:
        raise TextTooShortError(
            f"the text is shorter than one window of {length} tokens: give more text or a shorter window"
        )


def answer_windows(tokenizer, pairs: Iterable[Any], length: int) -> tuple[Tensor, Tensor]:
    """Prompts with answers as ids and labels ``[n, length]`` int64: what is learned is the answer and its end.

    Pairs are padded on the right; those that do not fit into ``length`` are left out.

    Args:
        tokenizer: a transformers tokenizer.
        pairs: tuples of a prompt and its answer, or rows with the columns ``prompt`` and ``answer``, in a list, a data
            frame, a data set or any iterable.
        length: tokens per row.

    Raises:
        DataError: a row is no such pair.
        TextTooShortError: if no pair fits.
        ValueError: if the tokenizer has no EOS token, by which an answer's end is learned.
    """
    if tokenizer.eos_token_id is None:
        raise OptionError("the tokenizer has no EOS token: set tokenizer.eos_token, answers could not end")
    rows = []
    for prompt, answer in _prompted(pairs):
        start = tokenizer(prompt, verbose=False)["input_ids"]
        end = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        left = length - len(start) - len(end)
        if left >= 0:
            padding = [tokenizer.eos_token_id] * left
            rows.append((start + end + padding, [IGNORED] * len(start) + end + [IGNORED] * left))
    if not rows:
        raise TextTooShortError(f"no prompt and answer fit into {length} tokens: use a larger length")
    ids, labels = zip(*rows, strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def _windows(tokenizer, texts: Iterable[str] | Tensor, length: int) -> Iterator[Tensor]:
    if isinstance(texts, Tensor):
        if texts.ndim != 2 or texts.is_floating_point():
            raise DataError(f"token ids must be an integer tensor [n, T], got {texts.dtype} {list(texts.shape)}")
        for row in texts:
            yield from (w for w in row.long().split(length) if len(w) == length)
        return
    if isinstance(texts, str):
        raise DataError("texts must be a list (or any iterable) of strings, not one string")
    if tokenizer is None:
        raise OptionError("texts are strings, so a tokenizer is needed (it may be None only for token ids)")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pending: list[int] = []
    for text in texts_of(texts):
        pending += tokenizer(text, verbose=False)["input_ids"] + separator
        while len(pending) >= length:
            yield torch.tensor(pending[:length])
            pending = pending[length:]


def _prompted(pairs: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows_of(pairs), 1):
        found = (row.get("prompt"), row.get("answer")) if isinstance(row, dict) else row
        if not isinstance(found, tuple) or len(found) != 2:
            raise DataError(f"row {number}: expected a prompt and its answer, got {short(row)}")
        for field, text in zip(("prompt", "answer"), found, strict=True):
            check_text(f"row {number}", field, text)
        yield found
