"""Caches with coordinates at 1 to 16 bits: numbers of a model with rounded states, real bytes, shrinking in place."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface

from nestling import kv
from nestling.errors import AdapterError, BudgetError, CacheMismatchError
from nestling.kv.allocation.table import CHOICES, Allocation
from nestling.kv.cache.buffer import room
from nestling.kv.cache.layer import NestedLayer
from nestling.kv.cache.packed import Coding, Layout, PackedRows
from nestling.kv.cache.window import TOKENS_PER_BLOCK
from nestling.kv.evaluation.evaluate import held_bytes
from nestling.kv.integration.attach import cached
from nestling.kv.quantisation import cpu as kernels
from nestling.kv.training.sampling import schedule

from ..families import FAMILIES, nested_cache, tiny_fit, tiny_model
from .test_cache import recent_after, run

# The description of the format, once more.
CELLS = {1: 8, 2: 4, 3: 2, 4: 1, 5: 1 / 2, 6: 1 / 2, 7: 1 / 4, 8: 1 / 8}
SHRINK = {1: 0.65, 2: 0.93, 3: 1.0, 4: 1.02, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}


def rounded(z: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """What is read back of a coordinate that was stored with that many bits."""
    cell = CELLS[bits] * step
    place = torch.floor(z / cell).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (place + 0.5) * cell * SHRINK[bits]


def at_8_bits(states: torch.Tensor) -> torch.Tensor:
    """What is read back of vectors at 8 bits a number, each with a scale of its own."""
    scale = (states.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    return (states / scale).round().clamp(-127, 127) * scale


def units(adapter, side: str, row: int) -> torch.Tensor:
    """What numbers of recent keys or values are measured in, ``[Hkv, 1, D]``: square roots of what they vary by, as
    steps of coordinates tell."""
    decode = torch.linalg.inv(adapter.encode[side][row].double())
    varies = (adapter.step[side][row].double()[:, None] ** 2 @ decode**2).sqrt()
    unit = varies.sqrt()
    return (unit / unit.amax(-1, keepdim=True)).clamp_min(0.001).half().float()


def as_stored(
    states: torch.Tensor, sinks: int, centre: torch.Tensor | float = 0.0, unit: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """What is read back of tokens ``[..., T, D]`` in the exact store, the first of which are sinks; they are measured
    in units, and keys from a centre."""
    stored = states.bfloat16().float()
    read = at_8_bits((stored - centre) / unit) * unit + centre
    rest = at_8_bits(stored - read)
    return torch.cat(((read + rest)[..., :sinks, :], read[..., sinks:, :]), -2)


def read_back(state, adapter, side: str, row: int, table) -> torch.Tensor:
    """Keys or values ``[B, Hkv, T, D]`` as a cache with that table gives them back."""
    out = torch.empty_like(state)
    for head in range(state.shape[1]):
        encode, mean, step = (getattr(adapter, n)[side][row, head] for n in ("encode", "mean", "step"))
        encode = encode.half().float()  # in which bases lie
        decode = torch.linalg.inv(encode.double()).half().float()
        stored, centre = (state[:, head] @ encode).bfloat16().float(), mean @ encode
        z = torch.zeros_like(stored)
        for i in range(z.shape[-1]):
            bits = int(table[row, head, i // 8])
            if bits == 16:
                z[..., i] = stored[..., i] - centre[i]
            elif bits:
                z[..., i] = rounded(stored[..., i] - centre[i], step[i], bits)
        out[:, head] = mean + z @ decode
    return out


def some_table(adapter, seed: int = 0) -> Allocation:
    """A table with every width in it, in no order."""
    layers, heads, width = adapter.shape
    rng = torch.Generator().manual_seed(seed)
    places = torch.randint(0, len(CHOICES), (2, layers, heads, -(-width // 8)), generator=rng)
    places[0, 0, 0, 0] = CHOICES.index(4)
    return Allocation(*torch.tensor(CHOICES)[places], width)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sinks, window", [(0, 0), (4, 6)])
def test_a_model_is_its_eager_self_with_rounded_keys_and_values(ids, family, sinks, window):
    """Of one layer: behind it, states that differ by a rounding error fall into other cells."""
    one = {"num_hidden_layers": 1} | ({"layer_types": ["full_attention"]} if family == "gemma3" else {})
    model = tiny_model(family, **one)
    adapter = tiny_fit(model, ids, sensitivity_windows=8)
    table = some_table(adapter)
    cache = nested_cache(model, adapter, budget=table, sinks=sinks, window=window, exact_prompt=False)
    rows = {layer: row for row, layer in enumerate(adapter.fingerprint["layers"])}
    exact = torch.zeros(40, 40, dtype=torch.bool)

    def eager(module, query, key, value, mask, **kwargs):
        row = rows.get(module.layer_idx)
        repeated, sides = query.shape[1] // key.shape[1], (("key", key, table.keys), ("value", value, table.values))
        whole, states = [], []
        for side, state, bits in sides:
            centre = 0.0 if side == "value" or row is None else adapter.mean["key"][row][:, None]
            kept = state if row is None else as_stored(state, sinks, centre, units(adapter, side, row))
            read = (
                kept
                if row is None
                else read_back(kept.bfloat16().float() if sinks else state, adapter, side, row, bits)
            )
            whole.append(kept.repeat_interleave(repeated, 1))
            states.append(read.repeat_interleave(repeated, 1))
        logits = torch.where(exact, query @ whole[0].mT, query @ states[0].mT)
        weight = (logits * kwargs["scaling"] + mask).softmax(-1)
        return ((weight * exact) @ whole[1] + (weight * ~exact) @ states[1]).transpose(1, 2), None

    AttentionInterface.register("rounded", eager)
    AttentionMaskInterface.register("rounded", AttentionMaskInterface()["eager"])
    stock = tiny_model(family, **one)
    stock.set_attn_implementation("rounded")
    for lengths in ([40], [24, 5, *[1] * 11]):
        ends = torch.arange(1, 41)  # each query sees what it would see as the last token
        recent = torch.tensor(
            [recent_after(max(n - sinks, 0), window, TOKENS_PER_BLOCK if window else 1) for n in ends.tolist()]
        )
        exact[:] = (torch.arange(40) < sinks) | (torch.arange(40) >= (ends - recent)[:, None])
        with torch.no_grad():
            expected = stock(input_ids=ids[:2, :40], use_cache=False).logits
        cache.reset()
        got = run(model, ids[:2, :40], cache, lengths)
        far = ~torch.isclose(got, expected, rtol=1e-3, atol=1e-3)
        assert far.any(-1).float().mean() < 0.05, "more than a rounding error at the border of a cell"


@pytest.fixture(params=["compiled", "torch", "triton"])
def products(request, monkeypatch):
    """With the compiled products, if there is a compiler, without, and with those for GPUs in Triton's interpreter."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled for the GPU, where test_gpu.py runs them")
        monkeypatch.setattr(kernels, "products", lambda rows, dtype: kernels._triton())
    elif kernels.compiled() is None:
        pytest.skip("there is no C compiler")


def test_heads_may_keep_nothing_at_all(fitted, ids):
    """Keys that are all at their mean are read evenly; values that are, add their mean."""
    made = fitted("llama-gqa")
    table = Allocation(*(torch.full((3, 2, 2), 8) for _ in range(2)), 16)
    table.keys[1], table.values[2, 1] = 0, 0
    options = dict(budget=table, sinks=0, window=0, exact_prompt=False)
    cache = nested_cache(made.model, made.adapter, **options)
    with torch.no_grad():
        whole = made.model(input_ids=ids[:2, :30], **cached(made.model, cache)).logits
        parts = run(made.model, ids[:2, :30], nested_cache(made.model, made.adapter, **options), [20, *[1] * 10])
    assert torch.isfinite(whole).all()
    far = ~torch.isclose(whole, parts, rtol=1e-3, atol=1e-3)
    assert far.any(-1).float().mean() < 0.1
    keys = cache.layers[1].expand(torch.float32)[0]
    torch.testing.assert_close(keys, made.adapter.mean["key"][1][:, None].expand_as(keys))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.lists(st.sampled_from(CHOICES), min_size=3, max_size=3).filter(lambda b: any(0 < x < 16 for x in b)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_rows_are_read_as_they_were_rounded(products, bits, lengths, seed):
    """Scores, weighted sums and coordinates against values rounded one by one; a width of 20 ends in half a block."""
    rng = torch.Generator().manual_seed(seed)
    layout, width = Layout.of(bits, 20), 20
    kept = [*layout.plain, *layout.coded]
    centre, step = torch.randn(2, 24, generator=rng), torch.rand(2, 24, generator=rng) + 0.2
    rows = PackedRows(layout, Coding.of(layout, centre[:, layout.coded], step[:, layout.coded]))
    z = torch.randn(2, 3, 24, sum(lengths), generator=rng).bfloat16().float()
    z[:, :, width:] = 0
    for part in z[:, :, kept].split(lengths, -1):
        rows.append(part, torch.bfloat16)
    wanted = []
    for i in kept:
        b = bits[i // 8]
        row = z[:, :, i]
        wanted.append(row if b == 16 else rounded(row - centre[:, i, None, None], step[:, i, None, None], b))
    wanted = torch.stack(wanted, -1)
    assert rows.length == sum(lengths)
    torch.testing.assert_close(rows.coordinates(torch.float32), wanted, rtol=1e-4, atol=1e-4)
    flat = wanted.flatten(0, 1)
    query, weight = torch.randn(6, 5, len(kept), generator=rng), torch.rand(6, 5, sum(lengths), generator=rng)
    scores = torch.full((6, 5, sum(lengths)), torch.nan)
    rows.score(query, scores, 0.3)
    torch.testing.assert_close(scores, 0.3 * query @ flat.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rows.weighted(weight), weight @ flat, rtol=1e-4, atol=1e-3)
    used = sum(b for b in bits if 0 < b < 16), len(layout.plain)
    assert rows.nbytes == 2 * 3 * room(rows.length) * (used[0] + 2 * used[1])


def test_long_histories_are_unpacked_in_parts(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    layout = Layout.of([4, 3], 16)
    rows = PackedRows(layout, Coding.of(layout, torch.zeros(1, 16), torch.full((1, 16), 0.3)))
    rows.append(torch.randn(1, 1, 16, 50, generator=rng), torch.bfloat16)
    query, found = torch.randn(1, 2, 16, generator=rng), []
    for size in (1000, 7):
        monkeypatch.setattr("nestling.kv.cache.packed.TOKENS", size)
        scores = torch.empty(1, 2, 50)
        rows.score(query, scores, 1.0)
        found.append((scores, rows.weighted(scores.softmax(-1))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
@pytest.mark.parametrize("bits", [True, False])
def test_shrinking_leaves_what_a_smaller_cache_would_hold(fitted, ids, family, bits):
    made = fitted(family)
    budgets = (1.0, 0.6, 0.35, 0.2) if bits else (1.0, 0.8, 0.6, 0.55)
    options = dict(quantise=bits, sinks=2, window=3, exact_prompt=False, context=200, dtype=torch.bfloat16)
    cache = nested_cache(made.model, made.adapter, budgets[0], **options)
    run(made.model, ids[:2, :40], cache, [40])
    before = cache.nbytes
    for budget in budgets[1:]:
        cache.shrink(budget)
        small = nested_cache(made.model, made.adapter, budget, **options)
        run(made.model, ids[:2, :40], small, [40])
        assert cache.nbytes == small.nbytes < before and torch.equal(
            cache.allocation.stacked, small.allocation.stacked
        )
        assert held_bytes(cache) == cache.nbytes
        # States behind the first layer differ, as they were read of other history: what was given to it does not.
        one, other = (next(layer for layer in c.layers if isinstance(layer, NestedLayer)) for c in (cache, small))
        for a, b in zip(one.expand(torch.float32), other.expand(torch.float32), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (one.exact is None) == (other.exact is None)
        assert one.exact is None or one.exact.length == other.exact.length
    out = made.model.generate(input_ids=ids[:2, :44], **cached(made.model, cache), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 48) and cache.get_seq_length() == 47


def test_a_copy_shrinks_by_itself_and_copies_no_model(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.5, quantise=True, window=0, context=200)
    run(made.model, ids[:1, :40], cache, [40])
    other, before = copy.deepcopy(cache), cache.nbytes
    assert other.factory is cache.factory
    other.shrink(0.25)
    assert other.nbytes < before == cache.nbytes


def test_shrinking_up_is_refused_and_changes_nothing(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.3, quantise=True, window=0, context=200)
    run(made.model, ids[:1, :20], cache, [20])
    before = cache.nbytes
    with pytest.raises(BudgetError, match="larger than the one in use"):
        cache.shrink(0.5)
    with pytest.raises(BudgetError):
        cache.shrink(0.0)
    assert cache.nbytes == before
    with pytest.raises(CacheMismatchError, match="made with an allocation"):
        nested_cache(made.model, made.adapter, some_table(made.adapter)).shrink(0.1)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_bytes_meet_the_budget(fitted, ids, budget):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, budget, quantise=True, sinks=1, window=1, context=1024)
    with torch.no_grad():
        for part in ids.repeat(1, 16)[:1, :1024].split(128, 1):
            made.model(input_ids=part, **cached(made.model, cache))
    assert held_bytes(cache) == cache.nbytes
    assert budget - 0.02 < cache.nbytes / cache.full_nbytes <= budget


def test_states_that_are_not_finite_are_refused_before_anything_is_stored(fitted):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.3, quantise=True, window=0)
    states = [torch.zeros(1, 2, 5, 16) for _ in range(2)]
    cache.layers[1].update(*states)
    states[1][0, 1, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="layer 1: values"):
        cache.layers[1].update(*states)
    assert cache.layers[1].length == 5 and cache.layers[1].groups[0].length in (1, 5)


def test_adapters_without_quantisation_costs_have_caches_of_ranks(fitted, ids, tmp_path):
    made = fitted("llama-gqa")
    old = kv.KVAdapter(made.adapter.fingerprint, made.adapter.encode, made.adapter.mean, made.adapter.drop_cost)
    assert not old.allocate(0.7).quantised and made.adapter.allocate(0.7).quantised
    with pytest.raises(AdapterError, match="calibrate or train it again"):
        schedule("bits", old)
    cache = nested_cache(made.model, old, 0.8, quantise=True, window=0, context=1000, dtype=torch.bfloat16)
    same = nested_cache(made.model, old, 0.8, window=0, context=1000, dtype=torch.bfloat16)
    with torch.no_grad():
        for held in (cache, same):
            made.model(input_ids=ids, **cached(made.model, held))
    assert cache.nbytes == same.nbytes
    config = kv.EvalConfig(budgets=[0.8], windows=1, length=40, sinks=0, window=0)
    assert not kv.evaluate(made.model, None, ids, old, config, progress=False)[1]["method"].endswith("bits")
    assert kv.evaluate(made.model, None, ids, made.adapter, config, progress=False)[1]["method"].endswith("-bits")
    old.save_pretrained(tmp_path / "old")
    assert not kv.KVAdapter.from_pretrained(tmp_path / "old").quantises
    made.adapter.save_pretrained(tmp_path / "new")
    again = kv.KVAdapter.from_pretrained(tmp_path / "new")
    assert again.quantises and torch.equal(again.allocate(0.3).stacked, made.adapter.allocate(0.3).stacked)


def test_a_budget_below_the_smallest_and_other_precisions_are_refused(fitted):
    made = fitted("llama-gqa")
    with pytest.raises(BudgetError):
        nested_cache(made.model, made.adapter, 0.001, quantise=True, sinks=0, window=0)
    with pytest.raises(BudgetError, match="16 bits"):
        nested_cache(made.model, made.adapter, 0.3, quantise=True, dtype=torch.float32)
    with pytest.raises(BudgetError, match="'layer' or a table, got 'greedy'"):
        nested_cache(made.model, made.adapter, 0.3, quantise=True, allocation="greedy")


def test_a_limit_in_bytes_holds_however_long_the_text_grows(fitted, ids):
    made = fitted("llama-gqa")
    options = dict(quantise=True, sinks=2, window=3, exact_prompt=False, context=400)
    cache = nested_cache(made.model, made.adapter, limit="0.05MiB", **options)
    text, budgets = ids.repeat(1, 8)[:1, :400], []
    with torch.no_grad():
        for part in text.split(10, 1):
            made.model(input_ids=part, **cached(made.model, cache))
            assert held_bytes(cache) <= 0.05 * 2**20
            budgets.append(cache.budget)
    assert budgets[0] == 1 and budgets == sorted(budgets, reverse=True) and 2 < len(set(budgets)) < 20
    assert cache.full_nbytes > 3 * cache.nbytes > 0.1 * 2**20
    with pytest.raises(BudgetError, match="limit='0.0003MiB' is out of reach"):
        nested_cache(made.model, made.adapter, limit="0.0003MiB", **options)
    with pytest.raises(BudgetError, match="limit='0.004MiB': 400 tokens take .* do not fit"):
        cache = nested_cache(made.model, made.adapter, limit="0.004MiB", **options)
        made.model(input_ids=text, **cached(made.model, cache))
