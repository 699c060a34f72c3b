"""What is measured of a new adapter: against `evaluate` and the sum of its costs, and where there is little text."""

from dataclasses import replace

import pytest
import torch
import yaml

from nestling.kv.allocation.allocate import losses_of, predicted
from nestling.kv.allocation.table import CHOICES, Allocation
from nestling.kv.cache.config import CacheConfig
from nestling.kv.evaluation import check
from nestling.kv.evaluation.check import checked, expected
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import evaluate


@pytest.fixture
def small(monkeypatch):
    """Sizes at which tiny models with one window lose something."""
    monkeypatch.setattr(check, "LENGTH", 60)
    monkeypatch.setattr(check, "BUDGETS", (0.9, 0.8, 1e-4))


def test_rows_are_those_of_evaluate_and_what_costs_add_up_to(fitted, ids, small):
    made = fitted("llama-gqa")
    measured = checked(made.model, None, ids, made.adapter, progress=False).info["measured"]
    config = EvalConfig(budgets=(0.9, 0.8), windows=1, length=60, chunk=check.CHUNK)
    expected = evaluate(made.model, None, ids, made.adapter, config, progress=False)[1:]
    assert measured["length"] == 60 and [row["budget"] for row in measured["rows"]] == [0.9, 0.8]
    for row, full in zip(measured["rows"], expected, strict=True):
        assert all(row[name] == full[name] for name in ("bytes_share", "kl", "kl_99", "kl_first", "kl_last"))
    plans = [check.planned(made.adapter, CacheConfig(budget=b, context=60)).allocation for b in (0.9, 0.8)]
    assert [row["predicted"] for row in measured["rows"]] == [predicted(made.adapter, plan) for plan in plans]


def test_a_prediction_is_the_sum_over_blocks(fitted):
    adapter = fitted("llama-gqa").adapter
    layers, heads, width = adapter.shape
    bits = torch.tensor(CHOICES)[torch.randint(len(CHOICES), (2, layers, heads, -(-width // 8)))]
    losses, total = losses_of(adapter), 0.0
    for index in torch.cartesian_prod(*map(torch.arange, bits.shape)).tolist():
        total += float(losses[tuple(index)][CHOICES.index(int(bits[tuple(index)]))])
    assert predicted(adapter, Allocation(bits[0], bits[1], width)) == pytest.approx(total)
    full = torch.full_like(bits[0], 16)
    assert predicted(adapter, Allocation(full, full, width)) == 0


def test_what_is_expected_passes_through_what_was_measured(fitted):
    adapter = fitted("llama-gqa").adapter
    allocation = adapter.allocate(0.5)
    loss = predicted(adapter, allocation)
    assert expected(adapter, 0.5, allocation) == loss
    rows = [{"budget": 0.5, "predicted": 0.2, "kl": 0.1}, {"budget": 0.125, "predicted": 0.1, "kl": 0.4}]
    known = replace(adapter, info={**adapter.info, "measured": {"rows": rows}})
    for share, ratio in ((0.5, 0.5), (0.125, 4.0), (0.25, 2**0.5), (0.01, 4.0)):
        assert expected(known, share, allocation) == pytest.approx(loss * ratio)
    assert expected(known, 0.9, allocation) == 0.1, "no more than at the largest that was measured"


def test_too_little_text_is_replaced_by_the_built_in_pages(fitted, small, monkeypatch):
    made, asked = fitted("llama-gqa"), []

    def measure(model, tokenizer, texts, adapter, config, progress):
        asked.append(texts)
        if texts is not None:
            raise check.TextTooShortError("no window")
        return [{"budget": None}, *({"budget": b, "kl": 0.1} for b in (0.9, 0.8))]

    monkeypatch.setattr(check, "evaluate", measure)
    measured = checked(made.model, None, ["few words"], made.adapter, progress=False).info["measured"]
    assert asked == [["few words"], None] and [row["kl"] for row in measured["rows"]] == [0.1, 0.1]


def test_the_card_shows_it_to_people_and_to_the_hub(fitted, ids, small, tmp_path):
    made = fitted("llama-gqa")
    adapter = checked(made.model, None, ids, replace(made.adapter, card=""), progress=False)
    adapter.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    row = adapter.info["measured"]["rows"][1]
    assert f"| 80 % | {100 * row['bytes_share']:.3g} % | {row['kl']:.2g} |" in card
    head = yaml.safe_load(card.split("---")[1])
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == pytest.approx(
        [r["kl"] for r in adapter.info["measured"]["rows"]], rel=1e-3
    )
    assert type(adapter).from_pretrained(tmp_path / "adapter").info["measured"] == adapter.info["measured"]
