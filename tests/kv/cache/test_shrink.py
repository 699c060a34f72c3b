"""Caches made smaller while in use, against fresh ones of the smaller budget that are given the same tokens."""

import copy
from dataclasses import fields, is_dataclass
from functools import cache as memoize
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling import kv
from nestling.errors import BudgetError
from nestling.kv.cache.layer import NestedLayer
from nestling.kv.evaluation.evaluate import held_bytes
from nestling.kv.integration.attach import fingerprint

from ..families import nested_cache, tiny_model

HEADS, WIDTH, LAYERS = 6, 16, 2  # more heads than groups


@memoize
def made():
    """A model, and an adapter whose bases are of whole numbers: nothing is rounded, so that results are equal."""
    model = tiny_model(
        "llama-mha",
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        hidden_size=HEADS * WIDTH,
    )
    rng = torch.Generator().manual_seed(0)
    shape = LAYERS, HEADS, WIDTH
    ones = torch.eye(WIDTH).expand(*shape, WIDTH)
    encode = {s: ones + torch.randint(-1, 2, (*shape, WIDTH), generator=rng).float().triu(1) for s in ("key", "value")}
    mean = {s: torch.randint(-2, 3, shape, generator=rng).float() for s in encode}
    drop_cost = {
        s: torch.rand(shape, generator=rng) * torch.rand(LAYERS, HEADS, 1, generator=rng) ** 2 for s in encode
    }
    step = {s: torch.full(shape, 2.0) for s in encode}
    shares = torch.tensor([1, 0.8, 0.24, 0.08, 0.02, 0.01, 0.006, 0.004, 0.002])  # at no bits, 1 bit, 2, ...
    quantisation_cost = {s: e[..., None] * shares for s, e in drop_cost.items()}
    model_fingerprint = fingerprint(model.config)
    return model, kv.KVAdapter(
        model_fingerprint, encode, mean, drop_cost, quantisation_cost=quantisation_cost, step=step
    )


def make(budget, **options) -> kv.NestedCache:
    model, adapter = made()
    return nested_cache(model, adapter, budget, **{"context": 1000, "dtype": torch.bfloat16, **options})


def states(count: int, batch: int, seed: int) -> torch.Tensor:
    """Keys and values of the layers, ``[L, 2, B, Hkv, t, D]``, of whole numbers."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (LAYERS, 2, batch, HEADS, count, WIDTH), generator=rng).bfloat16()


class Followed:
    """A cache, and what was done to each of its layers, but for shrinking."""

    def __init__(self, budget, **options):
        self.options, self.cache = options, make(budget, **options)
        self.start()

    def start(self):
        self.batch, self.done = 1, [[] for _ in range(LAYERS)]
        self.cropped = False

    def append(self, count: int, seed: int):
        for index, (keys, values) in enumerate(states(count, self.batch, seed)):
            self.cache.update(keys, values, index)
            self.done[index].append(("append", keys, values))

    def crop(self, count: int):
        """Tokens that were never compressed are as good as never seen."""
        count, self.cropped = min(count, self.cache.get_seq_length()), True
        for layer, done in zip(self.cache.layers, self.done, strict=True):
            if layer.uncompressed and all(what == "append" for what, *_ in done):
                keys, values = (torch.cat([part[i] for part in done], 2) for i in (1, 2)) if done else (None, None)
                left = 0 if keys is None else keys.shape[2] - count
                done[:] = [("append", keys[:, :, :left], values[:, :, :left])] if left else []
            else:
                done.append(("crop", -count))
        self.cache.crop(-count)

    def rows(self, index: torch.Tensor):
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(index)
            self.batch = len(index)
            for done in self.done:
                done.append(("rows", index))

    def reset(self):
        self.cache.reset()
        self.start()

    def check(self):
        """The cache holds what a fresh one of its budget does."""
        fresh = make(self.cache.budget, **{k: v for k, v in self.options.items() if k != "limit"})
        assert torch.equal(fresh.allocation.stacked, self.cache.allocation.stacked)
        for done, layer, other in zip(self.done, self.cache.layers, fresh.layers, strict=True):
            for what, *arguments in done:
                {"append": other.update, "crop": other.crop, "rows": other.batch_select_indices}[what](*arguments)
            assert layer.get_seq_length() == other.get_seq_length()
            assert [(g.heads, g.layouts) for g in layer.groups] == [(g.heads, g.layouts) for g in other.groups]
            if not layer.length:
                continue
            alike = compressed(layer) == compressed(other)
            assert alike.all() or self.cropped  # of tokens taken back, more or fewer may have been kept exact
            for one, another in zip(layer.expand(torch.float32), other.expand(torch.float32), strict=True):
                assert torch.equal(one[:, :, alike], another[:, :, alike])
        if not self.cropped:  # what was encoded stays so
            held, fresh_held = (sum(g.nbytes for layer in c.layers for g in layer.groups) for c in (self.cache, fresh))
            assert held == fresh_held and self.cache.nbytes == held_bytes(self.cache) <= fresh.nbytes


def compressed(layer: NestedLayer) -> torch.Tensor:
    """Which tokens of the text are compressed."""
    place = torch.arange(layer.length)
    if layer.exact is None:
        return place < (0 if layer.uncompressed else layer.length)
    return (place >= layer.exact.first) & (place < layer.exact.first + layer.exact.left)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30), st.integers(0, 999)),
    st.tuples(st.just("append"), st.just(1), st.integers(0, 999)),
    st.tuples(st.just("shrink"), st.floats(0.3, 1.0)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["reset", "copy"])),
)
GROWTH = st.tuples(st.just("append"), st.integers(1, 60), st.integers(0, 999))
KINDS = st.fixed_dictionaries(
    {
        "quantise": st.booleans(),
        "sinks": st.sampled_from([0, 0, 2, 5]),
        "window": st.sampled_from([0, 0, 3, 20, None, None]),
    }
)


def carry_out(followed: Followed, operation: tuple) -> None:
    what, *arguments = operation
    if what == "shrink":
        budget = arguments[0] * followed.cache.budget
        before = followed.cache.budget, followed.cache.nbytes
        try:
            followed.cache.shrink(budget)
        except BudgetError:
            assert budget < followed.cache.factory.smallest
            assert before == (
                followed.cache.budget,
                followed.cache.nbytes,
            )
    elif what == "rows":
        followed.rows(torch.tensor(arguments[0]) % followed.batch)
    elif what == "copy":
        followed.cache = copy.deepcopy(followed.cache)
    else:
        getattr(followed, what)(*arguments)


@settings(deadline=None, max_examples=50)
@given(start=st.sampled_from([1.0, 0.9, 0.7]), kind=KINDS, operations=st.lists(OPERATIONS, min_size=3, max_size=40))
@torch.no_grad()
def test_whatever_is_done_a_cache_holds_what_a_smaller_one_would(start, kind, operations):
    followed = Followed(start, **kind)
    for operation in operations:
        carry_out(followed, operation)
        if operation[0] in ("shrink", "reset"):
            followed.check()
    followed.check()


@settings(deadline=None, max_examples=30)
@given(
    kib=st.integers(10, 40),
    kind=KINDS,
    operations=st.lists(st.tuples(GROWTH, GROWTH, OPERATIONS), min_size=3, max_size=12),
)
@torch.no_grad()
def test_a_limit_holds_whatever_is_done(kib, kind, operations):
    try:
        followed = Followed(1.0, limit=f"{kib}KiB", **kind)
    except BudgetError:
        return
    for operation in chain.from_iterable(operations):
        before = followed.cache.get_seq_length(), followed.cache.budget
        try:
            carry_out(followed, operation)
        except BudgetError as error:
            assert f"limit='{kib}KiB'" in str(error)
            assert before == (followed.cache.get_seq_length(), followed.cache.budget)
            break
        assert held_bytes(followed.cache) <= kib * 1024
    followed.check()
    followed.cache.reset()
    assert followed.cache.budget == 1.0 and followed.cache.limit == kib * 1024


# With models


def logits(model, ids, cache) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


def snapshot(cache) -> list[torch.Tensor]:
    """All that a cache holds, copied."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, NestedLayer):
            parts = layer.expand(torch.float32) if layer.length else []
        else:
            parts = [t for t in (layer.keys, layer.values) if t is not None]
        found += [t.clone() for t in parts]
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3", "llama-mqa"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 19, 20, 21, 22, 40])
@pytest.mark.parametrize(
    "options", [{"quantise": True}, {}, {"quantise": True, "keep_tokens": 0.8}], ids=["bits", "ranks", "evict"]
)
def test_at_any_length_a_shrunk_cache_goes_on_as_a_smaller_one(fitted, ids, family, tokens, options):
    """The exact store has room for 20 tokens. In one layer, since states behind it depend on what was read."""
    case = fitted(family)
    for start, budgets in ((1.0, (0.9, 0.8)), (0.9, (0.9, 0.8, 0.8))):
        caches = [
            nested_cache(case.model, case.adapter, b, sinks=2, window=3, context=1000, **options) for b in (start, 0.8)
        ]
        for cache in caches:
            if tokens:
                logits(case.model, ids[:2, :tokens], cache)
        for budget in budgets:
            caches[0].shrink(budget)
        assert caches[0].nbytes <= caches[1].nbytes and caches[0].budget == 0.8
        one, other = (next(layer for layer in c.layers if isinstance(layer, NestedLayer)) for c in caches)
        if tokens:
            for a, b in zip(one.expand(torch.float32), other.expand(torch.float32), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        ends = [logits(case.model, ids[:2, tokens : tokens + 8], cache) for cache in caches]
        assert torch.isfinite(ends[0]).all()
        if tokens == 0:
            assert torch.equal(*ends)
        for cache in caches:  # one token more, and there is no room for drafts to be taken back
            logits(case.model, ids[:2, :1], cache)
        assert caches[0].nbytes == caches[1].nbytes


@pytest.mark.parametrize("bits", [True, False])
def test_no_cache_is_made_to_shrink_or_to_find_room(fitted, ids, monkeypatch, bits):
    case = fitted("llama-gqa")
    limited = nested_cache(case.model, case.adapter, "150KiB", quantise=bits, sinks=2, window=3, context=1000)
    shrunk = nested_cache(case.model, case.adapter, 0.9, quantise=bits, sinks=2, window=3, context=1000)
    logits(case.model, ids[:1, :50], shrunk)

    def refuse(*args, **kwargs):
        raise AssertionError("a cache was made")

    monkeypatch.setattr(kv.NestedCache, "__init__", refuse)
    shrunk.shrink(0.7)
    for part in ids.flatten()[None].split(32, 1)[: 16 if bits else 8]:
        logits(case.model, part, limited)
    assert limited.budget < 1 and held_bytes(limited) <= 150 * 1024


def test_what_does_not_change_is_not_copied(fitted, ids):
    """A shrunk layer shares storage with what it was, wherever both are the same."""
    case = fitted("llama-gqa")
    cache = nested_cache(case.model, case.adapter, 0.9, sinks=2, window=3, context=1000)
    logits(case.model, ids[:1, :50], cache)
    before = sides(cache)
    cache.shrink(0.85)
    after = sides(cache)
    common = before.keys() & after.keys()
    assert 0 < len(common) < len(before)
    for place in common:
        (layout, encode), (same_layout, same_encode) = before[place], after[place]
        assert layout == same_layout
        assert encode is same_encode if encode is None else torch.equal(encode, same_encode)


def sides(cache) -> dict[int, tuple]:
    """Layouts and bases by where coordinates are stored."""
    groups = [group for layer in cache.layers for group in layer.groups]
    return {id(group.rows[s]): (group.layouts[s], group.bases[s].encode) for group in groups for s in (0, 1)}


def test_an_error_leaves_everything_as_it_was(fitted, ids):
    for family in ("llama-gqa", "gemma3"):  # the latter begins with a layer that is not compressed
        case = fitted(family)
        cache = nested_cache(case.model, case.adapter, 0.9, sinks=2, window=3, context=1000)
        logits(case.model, ids[:2, :40], cache)
        before, state = snapshot(cache), (cache.budget, cache.nbytes, cache.get_seq_length(), cache.allocation)
        for wrong in (0.95, 0.0, 0.3, -1, "64MiB", "a half", float("nan"), True, None):
            with pytest.raises(BudgetError):
                cache.shrink(wrong)
            assert same(snapshot(cache), before)
            assert (cache.budget, cache.nbytes, cache.get_seq_length(), cache.allocation) == state
        limit = sum(layer.nbytes for layer in cache.layers if isinstance(layer, NestedLayer)) + 2000
        cache = nested_cache(case.model, case.adapter, 0.6, sinks=2, window=3, context=1000, limit=limit)
        logits(case.model, ids[:2, :40], cache)
        before = snapshot(cache)
        with pytest.raises(BudgetError, match="do not fit"):
            logits(case.model, ids.repeat(1, 4)[:2, 40:240], cache)
        assert same(snapshot(cache), before) and cache.get_seq_length() == 40
        logits(case.model, ids[:2, 40:41], cache)


def test_a_shrink_that_was_interrupted_is_finished_by_the_next(fitted, ids, monkeypatch):
    case = fitted("llama-gqa")
    cache, other = (nested_cache(case.model, case.adapter, 1.0, sinks=2, window=3, context=1000) for _ in range(2))
    for held in (cache, other):
        logits(case.model, ids[:1, :40], held)
    move, calls = NestedLayer.move, []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        move(self, *args)

    monkeypatch.setattr(NestedLayer, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.shrink(0.7)
    monkeypatch.undo()
    assert cache.budget == 1.0
    assert torch.isfinite(logits(case.model, ids[:1, 40:41], copy.deepcopy(cache))).all()
    cache.shrink(0.7)
    other.shrink(0.7)
    assert cache.budget == 0.7 and same(snapshot(cache), snapshot(other))


@pytest.mark.parametrize("options", [{}, {"limit": "0.14MiB"}, {"keep_tokens": 0.7}], ids=["plain", "limit", "evict"])
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_after_reset_a_cache_is_as_it_was_made(fitted, ids, start, options):
    case = fitted("llama-gqa")
    cache, fresh = (
        nested_cache(case.model, case.adapter, start, sinks=2, window=3, context=1000, **options) for _ in range(2)
    )
    text = ids.flatten()[None, :300]
    for part in text.split(60, 1):
        logits(case.model, part, cache)
    if not cache.limit:
        cache.shrink(0.7)
    assert cache.budget < start
    cache.reset()
    assert (cache.budget, cache.limit, cache.nbytes) == (fresh.budget, fresh.limit, 0)
    assert torch.equal(cache.allocation.stacked, fresh.allocation.stacked) and cache.get_seq_length() == 0
    for part in text.split(60, 1):
        assert torch.equal(logits(case.model, part, cache), logits(case.model, part, fresh))
    assert (cache.budget, cache.nbytes) == (fresh.budget, fresh.nbytes)


@pytest.mark.parametrize("start, sinks, window", [(1.0, 2, 3), (0.95, 2, 3), (1.0, 0, 0), (0.95, 0, 5)])
def test_heads_keep_their_own_tokens_and_what_was_read_of_them(start, sinks, window):
    """With eviction each head holds other tokens: when the order of heads changes, it does for all that is theirs."""
    torch.manual_seed(0)
    cache = make(start, sinks=sinks, window=window, keep_tokens=0.5)
    for index, (keys, values) in enumerate(states(150, 1, 0)):
        cache.update(keys, values, index)
        layer = cache.layers[index]
        mass = torch.rand(HEADS, 1, 150, generator=torch.Generator().manual_seed(index))
        layer.count_reads(mass[layer._order()])
        layer.evict()
        assert layer.hitters.evicted > 0
    before = [(layer.expand(torch.float32), in_order(layer)) for layer in cache.layers]
    order = [layer._order() for layer in cache.layers]
    cache.shrink(0.75)
    assert order != [layer._order() for layer in cache.layers]
    for (old, mass), layer in zip(before, cache.layers, strict=True):
        assert layer.exact is None or layer.exact.total == layer.length == 150
        assert torch.equal(in_order(layer), mass)
        for one, other in zip(layer.expand(torch.float32), old, strict=True):
            near = (one == other).all(-1).sum(-1)  # exact tokens are the same, and the others are near
            assert (near >= (layer.exact.length if layer.exact else 0)).all()
            assert ((one - other).square().mean((2, 3)) < (one - other.roll(1, 1)).square().mean((2, 3))).all()


def in_order(layer: NestedLayer) -> torch.Tensor:
    """What was read of the tokens of each head, in the model's order of heads."""
    return layer.hitters.mass if layer.order is None else layer.hitters.mass[layer.order[1]]


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_mode_of_the_caller_changes_nothing(fitted, ids, mode, bits):
    case = fitted("llama-gqa")
    found = []
    for name in ("no_grad", mode):
        cache = nested_cache(case.model, case.adapter, 1.0, quantise=bits, sinks=2, window=3, context=1000)
        logits(case.model, ids[:2, :40], cache)
        with MODES[name]():
            cache.shrink(0.8)
            cache.shrink(0.7)
        found.append((cache, snapshot(cache)))
    assert same(found[0][1], found[1][1])
    for held, _ in found:
        held.crop(-3)
    assert torch.equal(*(logits(case.model, ids[:2, 37:40], held) for held, _ in found))


WAYS = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("bits", [True, False])
def test_in_the_middle_of_generate(fitted, ids, options, bits):
    """From a logits processor: before, while and after tokens leave the exact store."""
    case = fitted("llama-gqa")
    cache = nested_cache(case.model, case.adapter, 1.0, quantise=bits, sinks=2, window=3, context=1000)
    budgets = iter([0.95, 0.9, 0.9, 0.85, 0.8, 0.75, 0.7])

    class Shrinking:
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] % 5 == 0:
                cache.shrink(next(budgets, 0.7))
            return scores

    out = case.model.generate(
        ids[:1, :9],
        past_key_values=cache,
        min_new_tokens=50,
        max_new_tokens=50,
        logits_processor=[Shrinking()],
        **options,
    )
    assert out.shape[1] == 59 and cache.budget == 0.7 and cache.get_seq_length() == 58


@pytest.mark.parametrize("bits", [True, False])
def test_a_limit_is_kept_when_the_batch_grows(fitted, ids, bits):
    case = fitted("llama-gqa")
    verbs = {
        "repeat": lambda c: c.batch_repeat_interleave(4),
        "select": lambda c: c.batch_select_indices(torch.tensor([0, 0, 0, 0])),
        "reorder": lambda c: c.reorder_cache(torch.tensor([0, 0, 0, 0])),
    }
    for verb in verbs.values():
        options = dict(quantise=bits, sinks=2, window=3, context=1000)
        cache = nested_cache(case.model, case.adapter, 1.0, **options)
        logits(case.model, ids[:1, :60], cache)
        limit = 3 * cache.nbytes
        cache = nested_cache(case.model, case.adapter, f"{limit}B", **options)
        logits(case.model, ids[:1, :60], cache)
        assert cache.budget == 1
        verb(cache)
        assert cache.budget < 1 and limit / 2 < held_bytes(cache) <= limit
        assert torch.isfinite(logits(case.model, ids[:4, 60:61], cache)).all()


def test_bases_are_counted_beside_what_is_held(fitted, ids):
    """Against all tensors that can be reached from a cache."""
    case = fitted("llama-gqa")
    cache = nested_cache(case.model, case.adapter, 0.5, quantise=True, sinks=2, window=3, context=1000)
    empty = cache.shared_nbytes
    logits(case.model, ids[:2, :40], cache)
    found, seen, todo = {}, set(), list(cache.layers)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif is_dataclass(item):
            todo += [getattr(item, each.name) for each in fields(item)]
        elif type(item).__module__.startswith("nestling") and hasattr(item, "__dict__"):
            todo += vars(item).values()
    orders = sum(t.nbytes for layer in cache.layers for t in layer.order or ())
    assert sum(found.values()) == cache.nbytes + cache.shared_nbytes + orders
    assert cache.shared_nbytes == empty > 0 and nested_cache(case.model, case.adapter, 1.0).shared_nbytes == 0
