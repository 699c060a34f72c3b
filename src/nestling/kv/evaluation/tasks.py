"""What a cache is asked: multiple-choice questions and hidden passkeys; and what it holds.

Used by `nestling.kv.evaluation.evaluate`. Everything here is deterministic, and text goes through a cache in chunks.
"""

import random
import re
from collections.abc import Callable, Mapping
from functools import partial as bind
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from nestling.errors import EvaluationError
from nestling.kv.evaluation.scoring import Pair, forward, read
from nestling.options import whole

BLANK = re.compile(r"(?<![_\w])_(?![_\w])")
STATIC = ("encode", "decode", "biases", "order", "units", "drift", "step", "scale", "offset")  # of a nested cache
DEPTHS = (0.1, 0.35, 0.6, 0.85)  # of what is asked for, as shares of a prompt
FILLER = (
    "The grass is green and the sky is blue.", "A ship leaves the harbour before the sun is up.",
    "Most of the houses in the village are built of stone.", "Rain fell on the hills for the whole of the afternoon.",
    "She closed the book and looked out of the window.", "The train to the coast stops at every small station.",
    "Bread is baked early, and the street smells of it.", "Nobody could say who had planted the old trees.",
    "In winter the lake freezes and children skate on it.", "He painted the door red, then changed his mind.",
)  # fmt: skip


def choice_pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (context, continuation) of each choice of a question ``{"question", "choices", ...}``.

    The question is the context and the choice, after a space, continues it. Where the question has one blank ``_``
    with words after it (WinoGrande), the text up to the blank with the choice in it is the context, and the rest of
    the sentence is scored. A blank at the end is filled in and scored as any other choice.
    """
    question, choices = row["question"].rstrip(), [choice.strip() for choice in row["choices"]]
    parts = BLANK.split(question)
    if len(parts) == 2 and re.search(r"\w", parts[1]):
        return [(parts[0] + choice, parts[1]) for choice in choices]
    if len(parts) == 2:
        return [(parts[0].rstrip(), f" {choice}{parts[1]}") for choice in choices]
    return [(question, f" {choice}") for choice in choices]


def encode_question(tokenizer, row: Mapping[str, Any]) -> list[Pair]:
    """`choice_pairs` as token ids. Each pair is tokenised as one text and cut where its context's own tokens end.

    Choices of one context share the cut: it is early enough for all of them.
    """
    pairs = choice_pairs(row)
    joint = [tokenizer(context + rest, verbose=False)["input_ids"] for context, rest in pairs]
    cuts: dict[str, int] = {}
    for (context, _), ids in zip(pairs, joint, strict=True):
        alone = tokenizer(context, verbose=False)["input_ids"]
        cut = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        cuts[context] = min(cut, len(ids) - 1, cuts.get(context, cut))
    if min(cuts.values()) < 1:
        raise EvaluationError(f"a question leaves no token of context before its choices: {row['question']!r:.80}")
    return [(ids[: cuts[context]], ids[cuts[context] :]) for (context, _), ids in zip(pairs, joint, strict=True)]


def passkey_prompts(tokenizer, n: int) -> list[tuple[Tensor, str]]:
    """Prompts of exactly ``n`` tokens that hide a key at each of `DEPTHS`: (ids ``[n]``, its 5 digits).

    Everything is drawn from a generator seeded by ``n`` and the depth, so the prompts are always the same.

    Raises:
        OptionError: if ``n`` is no whole number.
        EvaluationError: if ``n`` has no room for the text that states the key and asks for it.
    """
    n = whole("passkey", n)
    ids, prompts = bind(_ids, tokenizer), []
    for depth in DEPTHS:
        rng = random.Random(f"{n} {depth}")
        digits = str(rng.randint(10000, 99999))
        head = tokenizer("There is a pass key hidden in this text. Find it and remember it.\n")["input_ids"]
        needle = ids(f" The pass key is {digits}. Remember it: {digits} is the pass key.")
        tail = ids("\nWhat is the pass key? The pass key is")
        sentences: list[list[int]] = []
        room = n - len(head) - len(needle) - len(tail)
        if room < 0:
            raise EvaluationError(f"a passkey prompt of {n} tokens is too short: it takes {n - room} without filler")
        while room > 0:
            sentences.append(ids(f" {rng.choice(FILLER)}")[:room])
            room -= len(sentences[-1])
        sentences.insert(round(depth * len(sentences)), needle)
        prompts.append((torch.tensor([*head, *chain.from_iterable(sentences), *tail]), digits))
    return prompts


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def number_answer(
    model, tokenizer, ids: Tensor, cache: Cache, chunk: int, check: Callable[[list[float]], None], limit: int = 12
) -> tuple[str | None, int]:
    """The first number of the greedy answer to a prompt ``[n]``, or None, and the bytes held after the prompt.

    ``check`` is given the largest logit of each of at most ``limit`` tokens.
    """
    logits, answer = read(model, ids[None], cache, chunk)[0], []
    nbytes = held_bytes(cache, bounded=False)
    while True:
        check([float(logits.max())])
        answer.append(int(logits.argmax()))
        if len(answer) == limit or answer[-1] == tokenizer.eos_token_id:
            match = re.search(r"\d+", tokenizer.decode(answer))
            return match and match[0], nbytes
        logits = forward(model, torch.tensor([answer[-1:]]), cache)[0, -1]


def growing(cache: Cache) -> list:
    """The layers that grow with the text: those with a window of their own do not."""
    return [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]


def held_bytes(cache: Cache, bounded: bool = True) -> int:
    """Bytes of storage that a cache of any kind really holds; without ``bounded``, in the layers of `growing`.

    Every tensor that can be reached from its layers counts with its whole untyped storage, once; so do the parts of
    quantised tensors, with scales. Left out is what does not grow: bases, means, steps and the order of heads of a
    nested cache, scalar settings.
    """
    storages: dict[tuple[str, int], int] = {}
    seen: set[int] = set()

    def walk(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):  # a wrapper around other tensors, with no storage of its own
                for name in item.__tensor_flatten__()[0]:
                    walk(getattr(item, name))
            elif item.ndim:
                storage = item.untyped_storage()
                storages[str(item.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            for value in item.values():
                walk(value)
        elif isinstance(item, list | tuple | set):
            for value in item:
                walk(value)
        elif hasattr(item, "__dict__") and not isinstance(item, type | torch.nn.Module | PreTrainedConfig):
            for name, value in vars(item).items():
                if name not in STATIC:
                    walk(value)

    walk(list(cache.layers) if bounded else growing(cache))
    return sum(storages.values())
