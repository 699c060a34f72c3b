"""Log-likelihoods through caches, against the stock model one token at a time."""

import copy

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from nestling import kv
from nestling.errors import EvaluationError, OptionError

from ..families import nested_cache, tiny_fit, tiny_model

CONTEXT = list(range(5, 35))
RESTS = [[40], [41, 42, 43, 44, 45, 46, 47], [48, 49], list(range(50, 74))]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa")


@pytest.fixture(scope="module")
def adapter(model):
    return tiny_fit(model, torch.randint(3, 97, (8, 64), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def one_by_one(model, cache, context, rest):
    """The sum of log-likelihoods, and whether all are first choices, of a continuation read token by token."""
    total, greedy, ids = 0.0, True, [*context, *rest]
    for place, token in enumerate(ids[:-1]):
        logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        if place >= len(context) - 1:
            total += float(logits.double().log_softmax(-1)[ids[place + 1]])
            greedy &= int(logits.argmax()) == ids[place + 1]
    return total, greedy, len(rest)


@pytest.mark.parametrize("budget", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [5, 64])
def test_scores_are_those_of_a_cache_that_is_read_by_hand(model, adapter, budget, chunk):
    def make():
        return nested_cache(model, adapter, budget, exact_prompt=False, sinks=2, window=6)

    best = model.generate(torch.tensor([CONTEXT]), past_key_values=make(), max_new_tokens=3, do_sample=False)
    rests = [*RESTS, best[0, len(CONTEXT) :].tolist()]
    scores = kv.score(model, make, CONTEXT, rests, chunk)
    for found, rest in zip(scores, rests, strict=True):
        total, greedy, tokens = one_by_one(model, make(), CONTEXT, rest)
        assert found == (pytest.approx(total, abs=1e-3), greedy, tokens)
        assert found.mean == found.total / tokens
    assert [found.greedy for found in scores] == [False] * 4 + [True]


def test_a_cache_may_have_read_the_beginning(model, adapter):
    def make():
        return nested_cache(model, adapter, 0.6, exact_prompt=False, sinks=2, window=6)

    stem = make()
    with torch.no_grad():
        model(input_ids=torch.tensor([CONTEXT[:20]]), past_key_values=stem, use_cache=True)
    whole = kv.score(model, make, CONTEXT, RESTS)
    parts = kv.score(model, lambda: copy.deepcopy(stem), CONTEXT[20:], RESTS)
    assert [a.total for a in parts] == pytest.approx([b.total for b in whole], abs=1e-3)


def test_rows_do_not_share_a_limit_and_quantised_caches_are_not_repeated(model, adapter):
    def limited():
        return nested_cache(model, adapter, limit="20KiB", quantise=True, exact_prompt=False)

    assert kv.score(model, limited, CONTEXT, RESTS) == [kv.score(model, limited, CONTEXT, [rest])[0] for rest in RESTS]
    quantised = kv.score(
        model, lambda: QuantizedCache("quanto", model.config, nbits=4, q_group_size=16), CONTEXT, RESTS
    )
    assert len(quantised) == len(RESTS)


def test_nothing_to_score(model):
    def make():
        return DynamicCache(config=model.config)

    for context, rests in ([], [[1]]), ([1], []), ([1], [[2], []]):
        with pytest.raises(EvaluationError, match="one token at least"):
            kv.score(model, make, context, rests)
    with pytest.raises(OptionError, match="chunk=0"):
        kv.score(model, make, [1], [[2]], chunk=0)


def test_logits_that_are_not_finite(model):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        kv.score(broken, lambda: DynamicCache(config=model.config), [1, 2], [[3]])
