"""How likely continuations of a text are, when the text is read through a cache, in chunks."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

from nestling.errors import EvaluationError
from nestling.kv.integration.attach import cached, input_device, logits_of_last
from nestling.kv.integration.modes import in_default_mode
from nestling.options import whole

Pair = tuple[list[int], list[int]]  # ids of a context and of what continues it


class Score(NamedTuple):
    """What a model makes of a continuation.

    Attributes:
        total: its log-likelihood, in nats: the sum over its tokens.
        greedy: whether each of its tokens is the model's first choice.
        tokens: how many it has.
    """

    total: float
    greedy: bool
    tokens: int

    @property
    def mean(self) -> float:
        """Log-likelihood per token, in nats."""
        return self.total / self.tokens


@in_default_mode
@torch.no_grad()
def score(
    model, make: Callable[[], Cache], context: Sequence[int], continuations: Sequence[Sequence[int]], chunk: int = 64
) -> list[Score]:
    """Log-likelihoods of continuations of one context, which is read once, in chunks, and seen as it is stored.

    The cache is repeated for the continuations, which are padded on the right and read in chunks as well. Caches that
    cannot be repeated (transformers' quantised and linear-attention ones), or whose bytes have a limit that all rows
    would share, read the context again for each.

    Args:
        model: the causal LM, in eval mode.
        make: gives a new cache for one text: a `NestedCache` with ``exact_prompt=False``, or any other. It may hold
            tokens that come before the context.
        context: token ids, one at least.
        continuations: token ids, one at least each.
        chunk: tokens that go through the cache at once.

    Returns:
        A `Score` for each continuation, in their order.

    Raises:
        EvaluationError: the context or a continuation has no tokens, or logits are not finite.
        OptionError: ``chunk`` is no whole number.
    """
    chunk = whole("chunk", chunk)
    if not context or not continuations or not all(continuations):
        raise EvaluationError("a context and each of its continuations need one token at least")
    scores = _shared(model, make, list(context), [list(rest) for rest in continuations], chunk)
    if not all(math.isfinite(found.total) for found in scores):
        raise EvaluationError("the logits of a continuation are not finite (NaN or infinity)")
    return scores


def choice_scores(model, make: Callable[[], Cache], pairs: Sequence[Pair], chunk: int) -> list[float]:
    """The mean log-likelihood per token of each (context, continuation), in nats; a shared context is read once."""
    contexts = [context for context, _ in pairs]
    if contexts.count(contexts[0]) == len(contexts):
        return [found.mean for found in _shared(model, make, contexts[0], [rest for _, rest in pairs], chunk)]
    return [_shared(model, make, context, [rest], chunk)[0].mean for context, rest in pairs]


def _shared(model, make: Callable[[], Cache], context: list[int], rests: list[list[int]], chunk: int) -> list[Score]:
    cache = make()
    if len(rests) == 1 or _repeatable(cache):
        return _scores(model, cache, context, rests, chunk)
    return [_scores(model, make(), context, [rest], chunk)[0] for rest in rests]


def _repeatable(cache: Cache) -> bool:
    """Whether `batch_repeat_interleave` repeats everything: some layers inherit it and hold more than it knows."""
    partly = ("q_group_size", "conv_states")  # quantised layers, and those with a convolution
    return getattr(cache, "limit", None) is None and all(
        hasattr(layer, "batch_repeat_interleave") and not any(hasattr(layer, name) for name in partly)
        for layer in cache.layers
    )


def _scores(model, cache: Cache, context: list[int], rests: list[list[int]], chunk: int) -> list[Score]:
    longest = max(map(len, rests))
    ids = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=input_device(model))
    lengths = torch.tensor([[len(rest)] for rest in rests], device=ids.device)
    logits = read(model, torch.tensor([context]), cache, chunk)[:, None].expand(len(rests), -1, -1)
    if longest > 1 and len(rests) > 1:
        cache.batch_repeat_interleave(len(rests))
    totals, greedy = torch.zeros(len(rests), dtype=torch.float64), torch.ones(len(rests), dtype=torch.bool)
    for first in (0, *range(1, longest, chunk)):  # of the tokens that these logits are of
        if first:
            logits = forward(model, ids[:, first - 1 : min(first - 1 + chunk, longest - 1)], cache)
        labels = ids[:, first : first + logits.shape[1]]
        there = torch.arange(first, first + labels.shape[1], device=ids.device) < lengths
        losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        totals -= (losses.double() * there).sum(1).cpu()
        greedy &= ((logits.argmax(-1) == labels) | ~there).all(1).cpu()
    return [Score(float(t), bool(g), len(rest)) for t, g, rest in zip(totals, greedy, rests, strict=True)]


def forward(model, ids: Tensor, cache: Cache) -> Tensor:
    """Logits ``[B, t, V]`` of tokens ``[B, t]`` that follow those in the cache."""
    ids = ids.to(input_device(model))
    return model(input_ids=ids, use_cache=True, **cached(model, cache)).logits


def read(model, ids: Tensor, cache: Cache, chunk: int) -> Tensor:
    """Pass ids ``[B, n]`` through the cache in chunks; the last token's logits ``[B, V]``."""
    for part in ids.to(input_device(model)).split(chunk, 1):
        output = logits_of_last(model, part, cache)
    return output.logits[:, -1]
