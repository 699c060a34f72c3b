"""The choice of bases against caches that are really quantised, and its parts against what they say they do."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from nestling import kv
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import losses_of
from nestling.kv.allocation.steps import fill
from nestling.kv.allocation.table import CHOICES
from nestling.kv.calibration import choice
from nestling.kv.calibration.choice import _equal, choose, mixed
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.search import KLMeter
from nestling.kv.calibration.sensitivity import at_full_ranks

from ..families import tiny_fit, tiny_model

CONFIG = FitConfig(length=64, pieces=2, piece_length=64, sensitivity_length=64, window=0, context=64)


@pytest.fixture(scope="module")
def two(fitted, ids):
    """A model, its adapters in two bases, and their costs."""
    made = fitted("qwen3")
    adapters = [made.adapter, tiny_fit(made.model, ids, basis="pca")]
    costs = at_full_ranks(made.model, adapters, ids, CONFIG, False)
    return made, dict(zip(("balanced", "pca"), zip(adapters, costs, strict=True), strict=True))


def test_one_pass_measures_the_costs_of_any_basis(two, ids):
    made, candidates = two
    for adapter, costs in candidates.values():
        (alone,) = at_full_ranks(made.model, [adapter], ids, CONFIG, False)
        for name in ("drop_cost", "quantisation_cost", "step"):
            for side in SIDES:
                one, other = getattr(costs, name)[side], getattr(alone, name)[side]
                torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3 * float(other.max()))


def geometric_mean(case, adapter, texts) -> float:
    """The KL at the budgets, of a meter of its own for each text and table."""
    logs = []
    for share in choice.TOGETHER:
        table = fill(losses_of(adapter), adapter.shape[2]).tables([share])
        kl = [float(KLMeter(case.model, adapter, text[None], 4, 0)(table)) for text in texts]
        logs.append(math.log(sum(kl) / len(kl)))
    return math.exp(sum(logs) / len(logs))


def test_what_is_chosen_was_measured_to_be_the_best(two, ids):
    """Of each basis everywhere, and of what is best layer by layer, which is found here one by one."""
    case, candidates = two
    with progress_bar(False) as bar:
        chosen = choose(case.model, candidates, ids, CONFIG, bar)
    best = torch.zeros(2, 3, dtype=torch.int64)
    for side, row in product(range(2), range(3)):
        kl = []
        for adapter, costs in candidates.values():
            table = torch.full((1, 2, 3, 2, 3), 16)
            table[0, side, row] = _equal(losses_of(costs.of(adapter)), choice.ALONE)[side, row]
            kl.append(float(KLMeter(case.model, adapter, ids[[0, -1]], 4, 0)(table)))
        best[side, row] = kl.index(min(kl))
    options = [torch.zeros_like(best), torch.ones_like(best), best]
    adapters = [mixed(candidates, option) for option in options]
    measured = [geometric_mean(case, adapter, ids.view(4, 128)) for adapter in adapters]
    expected = adapters[measured.index(min(measured))]
    assert chosen.info["basis"] == expected.info["basis"]
    assert all(torch.equal(chosen.encode[side], expected.encode[side]) for side in SIDES)
    with progress_bar(False) as bar:
        again = choose(case.model, candidates, ids, CONFIG, bar)
    assert again.info == chosen.info and all(torch.equal(again.step[s], chosen.step[s]) for s in SIDES)


def test_a_mixture_has_the_bases_and_costs_of_its_parts(two):
    _, candidates = two
    which = torch.tensor([[0, 1, 1], [1, 0, 1]])
    mixture = mixed(candidates, which)
    names = list(candidates)
    assert mixture.info["basis"] == {"key": ["balanced", "pca", "pca"], "value": ["pca", "balanced", "pca"]}
    for (side, number), row in product(zip(SIDES, (0, 1), strict=True), range(3)):
        adapter, costs = candidates[names[which[number, row]]]
        assert torch.equal(mixture.encode[side][row], adapter.encode[side][row])
        assert torch.equal(mixture.mean[side][row], adapter.mean[side][row])
        assert torch.equal(mixture.quantisation_cost[side][row], costs.quantisation_cost[side][row])


def test_a_side_of_a_layer_gets_its_share_of_the_bits_at_the_least_loss(fitted):
    lost = losses_of(fitted("llama-gqa").adapter)  # two heads of two blocks
    table = _equal(lost, 0.25)
    assert table.shape == lost.shape[:-1] and (table.sum((2, 3)) <= 0.25 * 16 * 4).all()
    taken = lost.gather(-1, torch.tensor([CHOICES.index(b) for b in table.flatten().tolist()]).view(*table.shape, 1))
    for side, row in product(range(2), range(3)):
        spent, least = int(table[side, row].sum()), math.inf
        for bits in product(range(len(CHOICES)), repeat=4):
            if sum(CHOICES[b] for b in bits) <= spent:
                blocks = lost[side, row].reshape(4, -1)
                least = min(least, sum(float(blocks[i, b]) for i, b in enumerate(bits)))
        assert float(taken[side, row].sum()) == pytest.approx(least, rel=1e-6)


def test_the_default_names_the_basis_of_every_layer_and_side(ids, tmp_path):
    adapter = tiny_fit(tiny_model("qwen3"), ids, basis="auto")
    basis = adapter.info["basis"]
    assert list(basis) == list(SIDES) and all(len(names) == 3 for names in basis.values())
    assert {name for names in basis.values() for name in names} <= {"balanced", "pca"}
    adapter.save_pretrained(tmp_path / "adapter")
    read = kv.KVAdapter.from_pretrained(tmp_path / "adapter")
    assert read.info["basis"] == basis and "balanced for " in read.card
    old = replace(adapter, info={**adapter.info, "basis": "balanced"})
    old.save_pretrained(tmp_path / "old")
    assert kv.KVAdapter.from_pretrained(tmp_path / "old").info["basis"] == "balanced"
    for wrong in (3, {"key": ["pca"]}, {"key": "pca", "value": ["pca"]}, {"key": [1], "value": ["pca"]}):
        path = tmp_path / "old" / "nestling_adapter.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"basis": wrong, "sha256": None}))
        with pytest.raises(kv.AdapterError, match="'basis' must be a name, or lists of names by side"):
            kv.KVAdapter.from_pretrained(tmp_path / "old")
