"""The exact store: which tokens are exact, where they leave, and attention around those points."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.kv import CacheConfig, NestedCache
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache import matmul as products
from nestling.kv.cache.bases import LayerBases
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.packed import Layout
from nestling.kv.cache.rule import capacity
from nestling.kv.cache.window import TOKENS_PER_BLOCK, Window
from nestling.kv.quantisation.rows import Units

from .test_cache import one_layer

SIZES = [(0, 0), (4, 0), (0, 8), (4, 8), (30, 1)]  # sinks, window


def numbered(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[2, 1, t, 3]`` that hold the numbers of their tokens, and minus them."""
    keys = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(2, 1, -1, 3)
    return keys, -keys


def numbers(states) -> list[int]:
    keys, values = states
    assert torch.equal(keys, -values) and torch.equal(keys, keys[:1, :, :, :1].expand_as(keys))
    return keys[0, 0, :, 0].int().tolist()


@given(
    st.integers(0, 5),
    st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.0, 0.1, 0.4, 0.9]), st.integers(0, 5)),
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["crop", "append", "draft"]), st.integers(0, 25)), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_no_token_is_lost_or_moved(sinks, window, block, operations):
    """Sinks, then what has left, then what is held, are the text, after any appends and crops."""
    window = Window(*window)
    store, text, left = ExactStore(sinks, window, block), [], []
    oldest = 0  # of the tokens after the sinks, the first that may still be exact
    for number, (verb, count) in enumerate(operations):
        draft = 0
        if verb == "crop":
            count = min(count, len(text))
            coded = store.crop(count)
            text, left = text[: len(text) - count], left[: len(left) - coded]
        else:
            count += 1
            if verb == "draft" and window:  # what was exact before it stays here
                draft = len(text) + count - by_rule(len(text), sinks, window, block)
            start = 1000 * number + len(text)
            for gone in store.append(numbered(start, count), torch.float32, count if verb == "draft" else 0):
                left += numbers(gone)
            text += range(start, start + count)
        if not store.data:
            continue
        beyond = max(len(text) - sinks, 0)
        expected = min(max(by_rule(len(text), sinks, window, block), oldest), beyond)
        full = capacity(sinks, window, len(text), block)
        exact, spare = len(text) - len(left), max(len(left) - oldest, 0)
        full = max(exact, full)
        short = max(exact, min(exact + min(spare, 3 * len(left) // 4), full - 1))
        least = sinks + (window.least + block - 1 if window.least else 0)
        growth = (window.least + window.less) / window.share if window.share else math.inf
        size = max(full if len(text) >= min(4 * least, growth - 128) else short, draft)
        oldest = min(max(oldest, beyond - (size - store.first)), beyond)
        held = numbers(store.view())
        assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(store.view(), store.flat(), strict=True))
        assert held[: store.first] + left + held[store.first :] == text
        assert (store.first, store.left) == (min(sinks, len(text)), len(left)) and len(left) == expected
        assert store.data[0].shape == (2, 1, size, 3)


def by_rule(length: int, sinks: int, window: Window, block: int) -> int:
    """How many of so many tokens are compressed."""
    beyond, block = max(length - sinks, 0), block if window else 1
    recent = max(math.floor(length * window.share) - window.less, window.least) if window.share else window.least
    return next(left for left in range(0, beyond + 1, block) if beyond - left < recent + block)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_draft_that_is_taken_back_leaves_no_trace(steps):
    """Whatever was rejected, the store holds what it would have held without drafts."""
    store, plain, text = ExactStore(4, 8), ExactStore(4, 8), 0
    for accepted, rejected in steps:
        if accepted + rejected == 0:
            continue
        store.append(numbered(text, accepted + rejected), torch.float32, accepted + rejected)
        store.crop(rejected)
        if accepted:
            plain.append(numbered(text, accepted), torch.float32)
        text += accepted
        if text:
            assert (store.length, store.left) == (plain.length, plain.left)
            assert numbers(store.view()) == numbers(plain.view())
            assert store.nbytes <= plain.nbytes  # fewer spare ones in a short text


@pytest.mark.parametrize("back", range(1, TOKENS_PER_BLOCK - 1))
def test_nearly_as_much_can_be_taken_back_from_a_short_text(back):
    for length in range(4 + 8 + 2 * TOKENS_PER_BLOCK, 4 * capacity(4, 8)):
        store = ExactStore(4, 8)
        store.append(numbered(0, length), torch.float32)
        store.crop(back)
        assert store.length - store.first >= 8
        assert store.size <= max(store.length, capacity(4, 8) - 1)


@pytest.mark.parametrize("back", range(1, TOKENS_PER_BLOCK))
def test_without_drafts_the_window_survives_a_few_steps_back(back):
    """Token by token nothing more is held, and up to 15 tokens can be taken back from any place of a long text."""
    for length in range(4 * capacity(4, 8) + TOKENS_PER_BLOCK, 4 * capacity(4, 8) + 2 * TOKENS_PER_BLOCK):
        store = ExactStore(4, 8)
        for n in range(length):
            store.append(numbered(n, 1), torch.float32)
        store.crop(back)
        assert store.length - store.first >= 8
        assert numbers(store.view())[4:] == list(range(length - back - (store.length - 4), length - back))
        assert store.nbytes == 2 * 2 * capacity(4, 8) * 3 * 4


@pytest.mark.parametrize("sinks, window", [(0, 8), (4, 8)])
def test_blocks_leave_when_there_is_no_room(sinks, window):
    """One token before the boundary nothing has left; at it a whole block does, and the window stays."""
    store, addresses = ExactStore(sinks, window), set()
    full = sinks + window + TOKENS_PER_BLOCK - 1
    for n in range(4 * full + 3 * TOKENS_PER_BLOCK):
        gone = store.append(numbered(n, 1), torch.float32)
        if n + 1 < 4 * full:
            assert store.size == max(store.length, min(store.length + 3 * store.left // 4, full - 1))
        else:
            addresses.add(store.data[0].data_ptr())
        boundary = n >= full and (n - full) % TOKENS_PER_BLOCK == 0
        assert [numbers(g) for g in gone] == (
            [list(range(n - window - TOKENS_PER_BLOCK + 1, n - window + 1))] if boundary else []
        )
        if boundary:
            assert numbers(store.view()) == [*range(sinks), *range(n - window + 1, n + 1)]
    assert len(addresses) == 1, "it is written in place"


def test_room_is_only_for_what_is_exact():
    assert [capacity(s, w) for s, w in SIZES] == [0, 4, *(n + TOKENS_PER_BLOCK - 1 for n in (8, 4 + 8, 30 + 1))]
    store = ExactStore(4, 8)
    assert store.nbytes == 0
    store.append(numbered(0, 2), torch.bfloat16)
    assert store.nbytes == 2 * 2 * 2 * 3 * 2  # of a short text, all of it
    store.append(numbered(2, 200), torch.bfloat16)
    assert store.nbytes == 2 * 2 * capacity(4, 8) * 3 * 2
    store.apply(lambda t: t.repeat_interleave(3, 1))
    assert store.nbytes == 3 * 2 * 2 * capacity(4, 8) * 3 * 2
    store.reset()
    assert (store.nbytes, store.length, store.first) == (0, 0, 0)


RANKS = {
    "one group": ([8, 8, 8], [16, 16, 16]),
    "groups out of order": ([8, 16, 16, 8], [16, 8, 8, 16]),  # an order that is not its own inverse
    "a full-rank head": ([24, 8, 16], [24, 8, 8]),
    "full keys": ([24, 24, 24], [8, 16, 8]),
    "full values": ([8, 16, 8], [24, 24, 24]),
    "full rank": ([24, 24, 24], [24, 24, 24]),
}


def decode(ranks: str, sinks: int, window: int, steps, batch: int = 1, prompt: int = 2, mean: float | None = 1.0):
    """Run a prompt and steps through a layer and its reference, and compare every output. Negative steps crop."""
    generator = torch.Generator().manual_seed(len(steps) + prompt)
    table = Allocation.of_ranks(*(torch.tensor([side]) for side in RANKS[ranks]), 24)
    options = dict(sinks=sinks, window=window, exact_prompt=False)
    heads = len(RANKS[ranks][0])
    layer, module, reference = one_layer(heads, 2, 24, table, options, mean, generator)
    for count in (prompt, *steps):
        if count < 0:
            layer.crop(count)
            reference.crop(-count)
            continue
        key, value = (torch.randn(batch, heads, count, 24, generator=generator) for _ in range(2))
        query = torch.randn(batch, 2 * heads, count, 24, generator=generator)
        reference.append(key, value)
        position = torch.arange(reference.length)
        visible = (position <= position[-count:, None])[None, None].expand(batch, 1, -1, -1)
        out = layer.update(key, value)[0].attend(module, query, None if count == 1 else visible, scaling=0.3)
        torch.testing.assert_close(out.double(), reference.attend(query, visible, 0.3), rtol=1e-3, atol=1e-4)
        assert layer.get_seq_length() == reference.length
    return layer, reference


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sinks, window", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
def test_decoding_goes_over_every_boundary(ranks, sinks, window, batch):
    """From a prompt shorter than the sinks, token by token over three blocks, then a chunk over several."""
    layer, reference = decode(ranks, sinks, window, [1] * 60 + [3, 40, 1], batch)
    assert (layer.exact is None) == (ranks == "full rank" or not sinks + window)
    if layer.exact is not None:
        assert layer.exact.length == layer.exact.first + reference.recent
        assert layer.exact.length + layer.groups[0].length == 2 + 60 + 3 + 40 + 1


@pytest.mark.parametrize("sinks, window", SIZES)
@pytest.mark.parametrize("crop", [1, 7, 8, 20, 23, 24, 50, 99, 105])
def test_crops_beyond_the_window_leave_a_shorter_one_that_fills_again(sinks, window, crop):
    """Also into the sinks, and all of it; as assisted decoding and prompt lookup do after every step."""
    layer, reference = decode(
        "groups out of order", sinks, window, [*[1] * 5, -crop, 1, 4, -3, 2, *[1] * 30], prompt=100
    )
    if layer.exact is not None:
        assert layer.exact.length == layer.exact.first + reference.recent
    assert reference.recent >= window


def test_means_of_keys_are_not_quantised():
    """Keys whose mean is a hundred times what they vary by lose what they would without one."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 1, 30, 16, generator=generator) for _ in range(2))
    mean = 100 * torch.randn(2, 1, 1, 16, generator=generator)
    lost = {}
    units = Units.of(mean[:, 0, 0], [torch.ones(2, 16)] * 2)
    for name, own, added in (("plain", None, 0.0), ("raw", None, mean), ("centred", units, mean)):
        store = ExactStore(4, 8, 2, rows=True)
        store.units = own
        gone = [pair for part in (range(20), range(20, 30)) for pair in store.append(
            ((keys + added)[:, :, part], values[:, :, part]), torch.float32
        )]  # fmt: skip
        twin = copy.deepcopy(store)
        assert all(torch.equal(*pair) for pair in zip(twin.view(), store.view(), strict=True))
        left = torch.cat([pair[0] for pair in gone], 2)
        kept = store.view()[0]
        read = torch.cat((kept[:, :, :4], left, kept[:, :, 4:]), 2)
        lost[name] = float((read - added - keys).square().mean())
    assert lost["raw"] > 1000 * lost["plain"]
    assert lost["centred"] == pytest.approx(lost["plain"], rel=0.05)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_the_centre_is_the_mean_of_the_adapter_at_every_allocation(fitted, ids, family):
    """In the order in which heads are stored, which allocations change: rows from before them are still read right."""
    made = fitted(family)
    cache = NestedCache(made.model, made.adapter, CacheConfig(budget=0.9, context=60, exact_prompt=False))
    with torch.no_grad():
        made.model(input_ids=ids[:1, :60], past_key_values=cache)
        for share in (None, 0.8, 0.7):
            if share is not None:
                cache.shrink(share)
            for each in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
                for layer, mean in zip(each.layers, made.adapter.mean["key"], strict=True):
                    if layer.exact is not None:  # something is compressed
                        centre = layer.exact.units.centre[:, 0, 0]
                        assert torch.equal(centre if layer.order is None else centre[layer.order[1]], mean)
    assert any(layer.exact is not None for layer in cache.layers)


def test_no_tokens_to_crop_is_no_crop():
    layer, _ = decode("one group", 4, 8, [1, -3, -99], prompt=1)
    assert (layer.get_seq_length(), layer.exact.length, layer.groups[0].length) == (0, 0, 0)


@pytest.mark.parametrize("ranks", RANKS)
def test_several_threads_multiply_small_products_without_matmul(monkeypatch, ranks):
    """They take another way to the same numbers."""
    used = []
    elementwise = products._elementwise
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(products, "_elementwise", lambda *args: used.append(1) or elementwise(*args))
    for mean in (None, 1.0):
        decode(ranks, 4, 8, [1] * 40, mean=mean)
    assert bool(used) == (ranks != "full rank")


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_reach_the_query(batch):
    generator = torch.Generator().manual_seed(0)
    table = Allocation.of_ranks(torch.tensor([[8, 24, 16]]), torch.tensor([[16, 8, 24]]), 24)
    layer, module, _ = one_layer(3, 2, 24, table, dict(sinks=2, window=4, exact_prompt=False), 1.0, generator)
    states = [torch.randn(batch, 3, 40, 24, generator=generator) for _ in range(2)]
    query = torch.randn(batch, 6, 1, 24, generator=generator, requires_grad=True)
    handle, _ = layer.update(*states)
    out = handle.attend(module, query, None, scaling=0.3)
    (got,) = torch.autograd.grad(out.square().sum(), query)
    keys, values = (side.repeat_interleave(2, 1) for side in layer.expand(torch.float32))
    plain = ((query @ keys.mT * 0.3).softmax(-1) @ values).transpose(1, 2)
    (expected,) = torch.autograd.grad(plain.square().sum(), query)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("half", [True, False])
def test_bases_keep_no_more_than_the_ranks(half):
    bases = {
        f"{side}_{name}": torch.eye(24).repeat(3, 1, 1) for side in ("key", "value") for name in ("encode", "decode")
    }
    of_layer = LayerBases.of(bases, [([0, 2], (Layout.of((16, 0, 0), 24), Layout.of((16, 16, 0), 24)))], half)
    for side, rank in zip(of_layer.sides[0], (8, 16), strict=True):
        for matrices in (side.encode, side.decode):
            assert matrices.untyped_storage().nbytes() == 2 * rank * 24 * (2 if half else 4)
