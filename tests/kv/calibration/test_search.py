"""Rank search: the greedy descent against Algorithm 1 written out on real caches; blends against every one of them."""

import math
import sys

import pytest
import torch

from nestling import kv
from nestling.errors import TextTooShortError
from nestling.kv.allocation.allocate import blended, by_rank, worth
from nestling.kv.allocation.steps import fill
from nestling.kv.allocation.table import bits_of_ranks
from nestling.kv.calibration.search import SHARES, KLMeter, search
from nestling.kv.integration.attach import cached
from nestling.losses import kl_divergence

from ..families import nested_cache

OPTIONS = dict(windows=2, length=24, window=0)
WHOLE = {**OPTIONS, "sinks": 0, "window": 0}


@torch.no_grad()
def measured(case, bits, texts) -> float:
    """KL of bits ``[2, L, Hkv, blocks]`` on texts ``[n, T]``, read from caches that store as much as they say."""
    total = 0.0
    for text in texts:
        cache = nested_cache(case.model, case.adapter, kv.Allocation(*bits, case.adapter.shape[2]), paper=True)
        read = case.model(input_ids=text[None], **cached(case.model, cache)).logits[0]
        total += float(kl_divergence(case.stock(input_ids=text[None]).logits[0], read).mean())
    return total / len(texts)


def searched_by(case, texts, **options):
    return search(case.model, None, texts, case.adapter, kv.SearchConfig(**options), progress=False)


def test_greedy_is_algorithm_1(fitted, ids):
    case = fitted("qwen3")  # width 24, three steps
    texts = ids[:2, :24]
    ranks = torch.full((2, 3, 2), 24)
    visited = []
    while int(ranks.sum()) > 0.4 * 24 * 12:
        found = []
        for place in (ranks > 8).nonzero().tolist():
            lowered = ranks.clone()
            lowered[tuple(place)] -= 8
            found.append((measured(case, bits_of_ranks(lowered, 24), texts), lowered))
        ranks = min(found, key=lambda pair: pair[0])[1]
        visited.append(ranks)
    searched = searched_by(case, texts, method="greedy", per_sweep=1, lowest=0.4, **WHOLE)
    for expected in visited:
        table = searched.allocate(int(expected.sum()) / searched.full_elements, "greedy")
        assert torch.equal(table.coordinates, expected)
    units = sum(int((r > 8).sum()) for r in [torch.full((2, 3, 2), 24), *visited[:-1]])
    assert searched.info["search"]["forwards"] == 2 * (units + len(visited))
    assert searched.info["search"]["method"] == "greedy" and case.adapter.paths == {}


def test_greedy_by_many_lands_on_every_budget(fitted, ids):
    case = fitted("llama-gqa")
    searched = searched_by(case, ids, method="greedy", per_sweep=4, lowest=0.6, **OPTIONS)
    one = searched_by(case, ids, method="greedy", per_sweep=1, lowest=0.6, **OPTIONS)
    assert searched.info["search"]["forwards"] < 0.5 * one.info["search"]["forwards"]
    full = searched.full_elements
    for share in (1.0, 0.9, 0.75, 0.6, 0.55, 0.5):  # below 0.6 by drop cost
        elements = searched.allocate(share, "greedy").bits / 16
        assert share * full - 8 < elements <= share * full
    cache = nested_cache(case.model, searched, 0.75, allocation="greedy", paper=True)
    assert torch.equal(cache.allocation.stacked, searched.allocate(0.75, "greedy").stacked)


def test_the_meter_reads_what_a_cache_reads(fitted, ids):
    case = fitted("gemma3")
    meter = KLMeter(case.model, case.adapter, ids[:2, :24], 0, 0)
    tables = torch.stack([bits_of_ranks(torch.full((2, 1, 2), rank), 24) for rank in (8, 16, 24)])
    kl = meter(tables)
    assert kl.tolist() == pytest.approx([measured(case, t, ids[:2, :24]) for t in tables], rel=1e-3, abs=1e-7)
    assert float(kl[0]) > float(kl[1]) > abs(float(kl[2])) and meter.forwards == 6


def test_a_blend_is_the_best_one_that_was_measured(fitted, ids, monkeypatch):
    case, texts = fitted("qwen3"), ids[:2, :24]
    monkeypatch.setattr(sys.modules["nestling.kv.calibration.search"], "BUDGETS", (0.7, 0.45))
    searched = searched_by(case, texts, **WHOLE)
    info, by_cost = searched.info["search"], worth(case.adapter, "energy")
    assert info["forwards"] == 2 * 2 * len(SHARES) and info["method"] == "blend" and info["equal"] in SHARES
    means = []
    for share in SHARES:
        tables = fill(by_rank(blended(by_cost, 24, share), 24), 24).tables((0.7, 0.45))
        means.append(math.prod(measured(case, table, texts) for table in tables))
    assert means[SHARES.index(info["equal"])] <= min(means) * 1.01
    expected = fill(by_rank(blended(by_cost, 24, info["equal"]), 24), 24).at(0.6).stacked
    assert torch.equal(searched.allocate(0.6, quantise=False).stacked, expected)  # used by default from then on
    cache = nested_cache(case.model, searched, 0.6, paper=True)
    assert torch.equal(cache.allocation.stacked, expected) and case.adapter.allocation == "energy"


def test_what_was_searched_is_saved(tmp_path, fitted, ids):
    case = fitted("llama-gqa")
    searched = searched_by(case, ids, method="greedy", per_sweep=6, lowest=0.6, **OPTIONS)
    searched.save_pretrained(tmp_path / "adapter")
    read = kv.KVAdapter.from_pretrained(tmp_path / "adapter")
    assert read.info["search"] == searched.info["search"] and list(read.paths) == ["greedy"]
    torch.testing.assert_close(read.paths["greedy"], searched.paths["greedy"].float())
    for elements in range(200, 385, 8):
        tables = [one.allocate(elements / 384, "greedy") for one in (read, searched)]
        assert torch.equal(tables[0].stacked, tables[1].stacked)


def test_bad_input_is_refused(fitted, ids):
    case = fitted("llama-gqa")
    with pytest.raises(ValueError, match="method='random'.*blend, greedy"):
        searched_by(case, ids, method="random")
    with pytest.raises(ValueError, match="length=83 must be longer than the 83 exact tokens"):
        searched_by(case, ids, length=83)
    with pytest.raises(TextTooShortError):
        searched_by(case, ids, length=65, window=0)
    with pytest.raises(kv.AdapterError, match="made for another model"):
        search(case.model, None, ids, fitted("qwen3").adapter, kv.SearchConfig(**WHOLE))
    with pytest.raises(kv.BudgetError, match="must be 'energy', 'uniform', 'layer' or a table, got 'greedy'"):
        nested_cache(case.model, case.adapter, 0.75, allocation="greedy")


def test_of_a_large_vocabulary_some_tokens_stand_for_all(fitted, ids, monkeypatch):
    case = fitted("llama-gqa")
    table = torch.full((1, 2, 3, 2, 2), 4)
    every = KLMeter(case.model, case.adapter, ids[:4, :60], 0, 0)
    monkeypatch.setattr(sys.modules[KLMeter.__module__], "LOGITS", 40 * 97)
    most = KLMeter(case.model, case.adapter, ids[:4, :60], 0, 0)
    assert every.tokens is None and len(most.tokens) == 40 and most.tokens.unique().numel() == 40
    chosen = most(table)
    assert chosen.item() == pytest.approx(every(table).item(), rel=0.3) and chosen != every(table)
    assert torch.equal(chosen, KLMeter(case.model, case.adapter, ids[:4, :60], 0, 0)(table)), "the same each time"
