"""The cache against references that store everything: same tokens at full size, same numbers below it."""

import copy
import os
import subprocess
import sys
from functools import cache as memoize
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig
from transformers.cache_utils import CacheLayerMixin

from nestling import kv
from nestling.basis import balanced
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache import handle as handle_module
from nestling.kv.cache.bases import LayerBases, SideBasis
from nestling.kv.cache.buffer import Buffer, room
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.factory import CacheFactory
from nestling.kv.cache.groups import RankGroup
from nestling.kv.cache.layer import DRAFT, NestedLayer
from nestling.kv.cache.packed import Coding
from nestling.kv.cache.rule import capacity
from nestling.kv.cache.window import TOKENS_PER_BLOCK
from nestling.kv.integration.attach import attach, cached, fingerprint

from ..families import FAMILIES, cache_of_bases, nested_cache, tiny_model

LENGTH = dict(min_new_tokens=12, max_new_tokens=12)
MODES = {
    "greedy": dict(do_sample=False),
    "padded": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "returns": dict(do_sample=True, num_return_sequences=3, top_k=20),
    "chunked": dict(do_sample=False, prefill_chunk_size=7),
    "lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "assisted": dict(do_sample=False),
}


@memoize
def assistant():
    return tiny_model("llama-mha", seed=7, num_hidden_layers=1)


def prompts(ids, mode: str) -> dict[str, torch.Tensor]:
    if mode == "lookup":  # repetition, so that there is something to look up
        ids = ids[:1, :8].repeat(1, 3)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mode != "padded":
        return {"input_ids": ids[:1, :20], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    mask = (torch.arange(20) >= torch.tensor([0, 5, 13])[:, None]).long()
    return {"input_ids": ids[:3, :20] * mask, "attention_mask": mask}


def generate(model, ids, mode: str, **kwargs) -> list[list[int]]:
    torch.manual_seed(3)
    if mode == "assisted":
        kwargs["assistant_model"] = assistant()
    return model.generate(**prompts(ids, mode), **LENGTH, **MODES[mode], **kwargs).tolist()


@pytest.fixture(scope="module")
def expected(fitted, ids):
    return memoize(lambda family, mode: generate(fitted(family).stock, ids, mode))


@pytest.mark.parametrize("exact_prompt", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_generates_the_stock_tokens(fitted, expected, ids, family, mode, exact_prompt):
    made = fitted(family)
    cache = nested_cache(made.model, made.adapter, 1.0, exact_prompt=exact_prompt)
    assert generate(made.model, ids, mode, **cached(made.model, cache)) == expected(family, mode)
    assert cache.get_seq_length() > 20


@pytest.mark.parametrize("exact_prompt", [True, False])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_full_budget_generates_the_stock_tokens_in_bf16(fitted, ids, family, exact_prompt):
    model, stock = (tiny_model(family, dtype=torch.bfloat16) for _ in range(2))
    cache = nested_cache(model, fitted(family).adapter, 1.0, exact_prompt=exact_prompt)
    expected = generate(stock, ids, "padded")
    assert generate(model, ids, "padded", **cached(model, cache)) == expected


def test_a_small_budget_does_change_the_tokens(fitted, expected, ids):
    """The identity above is not that of a cache that is ignored."""
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.5, paper=True)
    assert generate(made.model, ids, "greedy", **cached(made.model, cache)) != expected("llama-gqa", "greedy")


# One layer against full-width attention in fp64


class Attention(nn.Module):
    """As much of an attention module as the cache reads."""

    is_causal = True

    def __init__(self, config):
        super().__init__()
        self.config, self.num_key_value_groups = config, config.num_attention_heads // config.num_key_value_heads


def llama_config(heads: int, groups: int, width: int) -> LlamaConfig:
    queries = heads * groups
    return LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=queries,
        num_key_value_heads=heads,
        head_dim=width,
        hidden_size=queries * width,
    )


def random_bases(heads: int, width: int, generator, mean: float | None = None) -> dict[str, torch.Tensor]:
    """Oblique bases with condition numbers like those of real keys and values, and means of a size, or none."""
    made = {}
    for side in ("key", "value"):
        c, m = (torch.randn(heads, 4 * width, width, generator=generator, dtype=torch.float64) for _ in range(2))
        basis = balanced(c.mT @ c, m.mT @ m)
        made |= {f"{side}_encode": basis.encode.float(), f"{side}_decode": basis.decode.float()}
        if mean is not None:
            made[f"{side}_mean"] = mean * torch.randn(heads, width, generator=generator)
    return made


def recent_after(tokens: int, window: int, block: int) -> int:
    """How many of so many tokens after the sinks are exact: whole blocks leave."""
    return tokens if tokens < window + block else window + (tokens - window) % block


class Reference:
    """One layer that keeps all keys and values in full, and knows which of them each query sees exact."""

    def __init__(
        self, bases, allocation: Allocation, groups: int, sinks: int, window: int, block: int = TOKENS_PER_BLOCK
    ):
        self.bases = {name: tensor.double() for name, tensor in bases.items()}
        self.groups, self.sinks, self.window = groups, sinks, window
        self.ranks = allocation.coordinates[:, 0].tolist()  # of keys and of values, by head
        self.block = block if window else 1
        self.states: list[torch.Tensor] | None = None
        self.left, self.oldest = 0, 0  # after the sinks: the compressed tokens, and the first one that can be exact

    @property
    def length(self) -> int:
        return 0 if self.states is None else self.states[0].shape[2]

    def append(self, key, value):
        old, new = self.length, [key.double(), value.double()]
        self.states = new if self.states is None else [torch.cat(p, 2) for p in zip(self.states, new, strict=True)]
        lengths = range(old + 1, self.length + 1)
        self.borders = [self.border(length) for length in lengths]  # of each query
        self.left = self.borders[-1]
        draft = old if 1 < len(lengths) <= DRAFT and self.window else self.length
        room = max(self.room, self.beyond(self.length) - self.rule(draft))  # of the exact store, sinks left out
        self.oldest = max(self.oldest, self.beyond(self.length) - room)

    @property
    def room(self) -> int:
        if self.length < 4 * capacity(self.sinks, self.window, self.block):
            free = max(self.window + self.block - 2, 0) if self.window else 0
            return max(self.recent, min(self.recent + 3 * self.left // 4, free))
        return self.window + self.block - 1 if self.window else 0

    @property
    def recent(self) -> int:
        return self.beyond(self.length) - self.left

    def beyond(self, length: int) -> int:
        return max(length - self.sinks, 0)

    def rule(self, length: int) -> int:
        return self.beyond(length) - recent_after(self.beyond(length), self.window, self.block)

    def border(self, length: int) -> int:
        return max(self.rule(length), self.left)

    def crop(self, count: int):
        self.states = [s[:, :, : self.length - count] for s in self.states]
        beyond = self.beyond(self.length)
        self.left = min(beyond, max(self.rule(self.length), min(self.left, self.oldest)))
        self.oldest = min(max(self.oldest, beyond - self.room), beyond)

    def select(self, index):
        self.states = [s[index] for s in self.states]

    def read(self, left: int) -> list[torch.Tensor]:
        """Keys and values as they can be read back with so many compressed, ``[B, Hkv, T, D]``."""
        sides = zip(("key", "value"), self.states, self.ranks, strict=True)
        return [
            torch.stack([self._head(s[:, h], side, h, r, left) for h, r in enumerate(ranks)], 1)
            for side, s, ranks in sides
        ]

    def _head(self, state, side: str, head: int, rank: int, left: int):
        encode, decode = self.bases[f"{side}_encode"][head, :, :rank], self.bases[f"{side}_decode"][head, :rank]
        mean = self.bases[f"{side}_mean"][head] if f"{side}_mean" in self.bases else torch.zeros_like(state[0, 0])
        read = mean + (state - mean) @ encode @ decode
        exact = torch.arange(state.shape[1])
        exact = (exact < self.sinks) | (exact >= self.sinks + left)
        full = rank == state.shape[-1]
        return torch.where((exact | full)[:, None] if not full else torch.ones_like(exact)[:, None], state, read)

    def attend(self, query, visible, scaling: float, exact: bool = False):
        """``[B, t, Hq, D]``; ``visible`` ``[B, 1, t, T]``. KV heads are expanded to the query heads."""
        borders, outs = self.borders[len(self.borders) - query.shape[2] :], []
        for border in sorted(set(borders)):  # which rise
            rows = [i for i, other in enumerate(borders) if other == border]
            states = self.states if exact else self.read(border)
            key, value = (s.repeat_interleave(self.groups, 1) for s in states)
            logits = (query[:, :, rows].double() @ key.mT * scaling).masked_fill(~visible[:, :, rows], -torch.inf)
            outs.append(logits.softmax(-1) @ value)
        return torch.cat(outs, 2).transpose(1, 2)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(0, 30)),
        st.tuples(st.sampled_from(["reorder", "repeat", "select"]), st.integers(0, 5)),
    ),
    min_size=1,
    max_size=7,
)


@st.composite
def layers(draw):
    heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width = draw(st.sampled_from([8, 10, 16, 24]))
    # few different ranks, so that heads share groups; the full width is one of them
    rank = st.sampled_from([*range(8, width, 8), width])
    sides = (torch.tensor([draw(st.lists(rank, min_size=heads, max_size=heads))]) for _ in range(2))
    allocation = Allocation.of_ranks(*sides, width)
    options = dict(
        sinks=draw(st.integers(0, 5)),
        window=draw(st.integers(0, 6)),
        block=draw(st.sampled_from([1, 2, 5, 16])),
        exact_prompt=draw(st.booleans()),
    )
    return heads, groups, width, allocation, options, draw(st.sampled_from([None, 0.0, 1.0, 2.0]))


def one_layer(heads, groups, width, allocation, options, mean, generator) -> tuple[NestedLayer, Attention, Reference]:
    config = llama_config(heads, groups, width)
    bases = random_bases(heads, width, generator, mean)
    cache = cache_of_bases({0: bases}, allocation, config, **options)
    exact = {name: options[name] for name in ("sinks", "window", "block") if name in options}
    return cache.layers[0], Attention(config), Reference(bases, allocation, groups, **exact)


@given(layers(), OPERATIONS, st.integers(1, 2), st.booleans(), st.integers(0, 2**16))
@settings(deadline=None, max_examples=120)
def test_a_layer_is_full_width_attention_to_truncated_states(shape, operations, batch, padded, seed):
    """After any sequence of verbs, in every path (exact, in coordinates, expanded), with and without padding."""
    generator = torch.Generator().manual_seed(seed)
    heads, groups, width, _, options, _ = shape
    layer, module, reference = one_layer(*shape, generator)
    pad = torch.randint(0, 3, (batch,), generator=generator) if padded else torch.zeros(batch, dtype=torch.long)
    for verb, count in [("append", 3), *operations]:
        if verb == "append":
            key, value = (torch.randn(batch, heads, count, width, generator=generator) for _ in range(2))
            query = torch.randn(batch, heads * groups, count, width, generator=generator)
            first = reference.length == 0
            reference.append(key, value)
            position = torch.arange(reference.length)
            visible = position <= position[-count:, None]
            visible = (visible & (position >= pad[:, None, None]))[:, None]
            # as transformers: no mask where SDPA's is_causal says the same
            mask = None if not padded and (first or count == 1) else visible
            handle, _ = layer.update(key, value)
            out = handle.attend(module, query, mask, scaling=0.3)
            rows = visible.any(-1)[:, 0]  # a padding token sees nothing, and nobody reads it
            expected = reference.attend(query, visible, 0.3, exact=first and options["exact_prompt"])
            torch.testing.assert_close(out[rows].double(), expected[rows], rtol=1e-3, atol=1e-4)
        elif verb == "crop":
            count = min(count, reference.length)
            layer.crop(-count)
            reference.crop(count)
        else:
            if verb == "reorder":
                index = torch.randint(0, batch, (batch,), generator=generator)
                layer.reorder_cache(index)
            elif verb == "repeat":
                index = torch.arange(batch).repeat_interleave(1 + count % 2)
                layer.batch_repeat_interleave(1 + count % 2)
            else:
                index = torch.arange(batch)[: max(1, batch - count)]
                layer.batch_select_indices(index)
            reference.select(index)
            batch, pad = len(index), pad[index]
        assert layer.get_seq_length() == reference.length
        assert layer.get_mask_sizes(2) == (reference.length + 2, 0)


@given(layers(), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_the_state_does_not_depend_on_the_chunks(shape, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, _, width, *_ = shape
    whole, _, _ = one_layer(*shape, torch.Generator().manual_seed(seed))
    parts, _, _ = one_layer(*shape, torch.Generator().manual_seed(seed))
    states = [torch.randn(2, heads, sum(lengths), width, generator=generator) for _ in range(2)]
    whole.update(*states)
    for pair in zip(*(s.split(lengths, 2) for s in states), strict=True):
        parts.update(*pair)
    for a, b in zip(whole.groups, parts.groups, strict=True):
        assert a.length == b.length
        for one, other in zip(a.rows, b.rows, strict=True) if a.length else ():
            torch.testing.assert_close(one.view(), other.view(), rtol=1e-4, atol=1e-5)
    assert (whole.exact is None) == (parts.exact is None)
    if whole.exact is not None:
        assert (whole.exact.length, whole.exact.first) == (parts.exact.length, parts.exact.first)
        for one, other in zip(whole.exact.view(), parts.exact.view(), strict=True):
            assert torch.equal(one, other)


@given(st.integers(0, 2**16), st.integers(2, 12), st.sampled_from([None, 1.0, 2.0]))
@settings(deadline=None, max_examples=40)
def test_attending_in_coordinates_is_attending_to_decoded_states(seed, count, mean):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.tensor([[8, 16, 24, 24]]), torch.tensor([[16, 16, 8, 24]])
    options = dict(sinks=2, window=3, exact_prompt=False)
    layer, module, reference = one_layer(4, 2, 24, Allocation.of_ranks(*ranks, 24), options, mean, generator)
    for n in (30, count):
        states = [torch.randn(2, 4, n, 24, generator=generator) for _ in range(2)]
        reference.append(*states)
        handle, _ = layer.update(*states)
    query = torch.randn(2, 8, count, 24, generator=generator)
    position = torch.arange(30 + count)
    mask = (position <= position[-count:, None])[None, None].expand(2, 1, -1, -1)
    outs = []
    for limit in (0, 99):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handle_module, "SHORT_QUERY", limit)
            outs.append(handle.attend(module, query, mask, scaling=0.25))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=3e-5)
    for out in outs:  # exact tokens beside compressed ones, in coordinates and expanded
        torch.testing.assert_close(out.double(), reference.attend(query, mask, 0.25), rtol=1e-3, atol=1e-4)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)  # an additive mask is as good
    torch.testing.assert_close(outs[1], handle.attend(module, query, bias, scaling=0.25), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def read_with(bases, states, query, sinks: int, window: int, rank: int) -> dict[str, torch.Tensor]:
    """What a cache of one layer gives to some queries at its end, in coordinates and expanded."""
    heads, width = states[0].shape[1], states[0].shape[3]
    config, ranks = llama_config(heads, 2, width), torch.full((1, heads), rank)
    options = dict(sinks=sinks, window=window, exact_prompt=False)
    layer = cache_of_bases({0: bases}, Allocation.of_ranks(ranks, ranks, width), config, **options).layers[0]
    handle, _ = layer.update(*states)
    module, position, outs = Attention(config), torch.arange(states[0].shape[2]), {}
    mask = (position <= position[-query.shape[2] :, None])[None, None]
    for path, limit in (("in coordinates", 99), ("expanded", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handle_module, "SHORT_QUERY", limit)
            outs[path] = handle.attend(module, query, mask, scaling=0.25)
    return outs


def with_means(seed: int) -> tuple[dict, list, torch.Tensor]:
    """Bases of rank 8, and states whose dropped coordinates are at a large mean, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    bases, states = random_bases(2, 16, generator, mean=3.0), []
    for side in ("key", "value"):
        held = torch.randn(1, 2, 40, 8, generator=generator) @ bases[f"{side}_decode"][:, :8]
        held = held / held.std() + 0.01 * torch.randn(1, 2, 40, 16, generator=generator)
        states.append(held + bases[f"{side}_mean"][:, None])
    return bases, states, torch.randn(1, 4, 5, 16, generator=generator)


@pytest.mark.parametrize("sinks, window", [(4, 0), (0, 8), (4, 8)])
@pytest.mark.parametrize("side", ["key", "value"])
def test_beside_exact_tokens_dropped_coordinates_must_be_at_their_mean(side, sinks, window):
    """At zero, compressed keys would be on another scale than the exact ones: full of error, and no reference's."""
    for seed in range(5):
        bases, states, query = with_means(seed)
        zero = {name: tensor for name, tensor in bases.items() if name != f"{side}_mean"}
        ranks = torch.full((1, 2), 8)
        reference = Reference(bases, Allocation.of_ranks(ranks, ranks, 16), 2, sinks, window)
        reference.append(*states)
        visible = (torch.arange(40) <= torch.arange(35, 40)[:, None])[None, None]
        expected, full = (reference.attend(query, visible, 0.25, exact=exact) for exact in (False, True))
        spread = float((full - bases["value_mean"].repeat_interleave(2, 0)).norm())  # of the outputs, about their mean
        good, bad = (read_with(b, states, query, sinks, window, 8) for b in (bases, zero))
        for path in good:
            torch.testing.assert_close(good[path].double(), expected, rtol=1e-3, atol=1e-4)
            error, worse = (float((out[path].double() - full).norm()) for out in (good, bad))
            assert worse > 0.1 * spread and worse > 10 * error, (path, error, worse, spread)
            assert float((bad[path].double() - expected).norm()) > 0.1 * spread


def test_among_compressed_tokens_only_the_mean_of_values_matters():
    for seed in range(5):
        bases, states, query = with_means(seed)
        both, no_key, none = (
            read_with({n: t for n, t in bases.items() if n not in left_out}, states, query, 0, 0, 8)
            for left_out in ((), ("key_mean",), ("key_mean", "value_mean"))
        )
        for path in both:
            torch.testing.assert_close(no_key[path], both[path], rtol=1e-3, atol=1e-4)
            assert float((none[path] - both[path]).norm()) > 0.1 * float(both[path].norm())


def test_means_cost_no_storage_and_full_ranks_have_none():
    bases = random_bases(3, 16, torch.Generator().manual_seed(0), mean=1.0)
    plain = {name: tensor for name, tensor in bases.items() if not name.endswith("mean")}
    table = Allocation.of_ranks(torch.tensor([[8, 16, 16]]), torch.tensor([[16, 8, 16]]), 16)
    made = [cache_of_bases({0: b}, table, llama_config(3, 1, 16), sinks=2, window=3) for b in (bases, plain)]
    for cache in made:
        cache.layers[0].update(*(torch.randn(1, 3, 30, 16) for _ in range(2)))
    assert made[0].nbytes == made[1].nbytes
    assert made[1].layers[0].biases == [None, None]
    places = {h: g.start + n for g in made[0].layers[0].groups for n, h in enumerate(g.heads)}
    found = {h: [bias[place] for bias in made[0].layers[0].biases] for h, place in places.items()}
    assert [[bool(b.any()) for b in found[h]] for h in range(3)] == [[True, False], [False, True], [False, False]]
    for head, side, rank in ((0, "key", 8), (1, "value", 8)):
        encode, decode, mean = (bases[f"{side}_{n}"][head].double() for n in ("encode", "decode", "mean"))
        rest = mean @ encode[:, rank:] @ decode[rank:]  # what is not kept of the mean
        got = found[head][0 if side == "key" else 1]
        torch.testing.assert_close(got.double(), rest[None], rtol=1e-4, atol=1e-4)
        assert got.untyped_storage().nbytes() == 3 * 16 * 4
    full = Allocation.of_ranks(*(torch.full((1, 3), 16) for _ in range(2)), 16)
    layer = cache_of_bases({0: bases}, full, llama_config(3, 1, 16)).layers[0]
    assert layer.biases == [None, None]


def test_caches_are_nested():
    """What a smaller cache stores is the beginning of what a larger one stores: one adapter, every budget."""
    bases = random_bases(2, 32, torch.Generator().manual_seed(0))
    config = llama_config(2, 2, 32)
    states = [torch.randn(1, 2, 40, 32) for _ in range(2)]
    stored = []
    for rank in (8, 16, 24):
        table = Allocation.of_ranks(torch.full((1, 2), rank), torch.full((1, 2), rank), 32)
        layer = cache_of_bases({0: bases}, table, config).layers[0]
        layer.update(*states)
        stored.append([rows.view() for rows in layer.groups[0].rows])
    for small, large in zip(stored, stored[1:], strict=False):
        for a, b in zip(small, large, strict=True):
            assert a.shape[2] < b.shape[2]
            torch.testing.assert_close(a, b[:, :, : a.shape[2]])


# Whole models


@torch.no_grad()
def run(model, ids, cache, lengths: list[int], **kwargs) -> torch.Tensor:
    """Logits ``[B, T, V]`` of ``ids`` fed in pieces."""
    pieces, start = [], 0
    for n in lengths:
        extra = {"attention_mask": kwargs["attention_mask"][:, : start + n]} if kwargs else {}
        pieces.append(model(input_ids=ids[:, start : start + n], **cached(model, cache), **extra).logits)
        start += n
    return torch.cat(pieces, 1)


BUDGETS = (0.55, 0.75, 0.9)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
@pytest.mark.parametrize("sinks, window", [(0, 0), (4, 0), (4, 6)])
def test_a_model_is_its_eager_self_with_truncated_keys_and_values(fitted, ids, family, budget, sinks, window):
    """The whole path against stock eager attention whose keys and values are ``mean + (k - mean) E_r D_r``.

    All but the sinks, and the recent tokens that were exact when a query was the last token.
    """
    made = fitted(family)
    options = dict(sinks=sinks, window=window, exact_prompt=False, context=4096)
    cache = nested_cache(made.model, made.adapter, budget, **options)
    rows = {layer: row for row, layer in enumerate(made.adapter.fingerprint["layers"])}
    exact = torch.zeros(40, 40, dtype=torch.bool)  # by query and key

    def truncated(module, query, key, value, mask, **kwargs):
        row = rows.get(module.layer_idx)
        whole, states = [], []
        for side, state, ranks in zip(("key", "value"), (key, value), cache.allocation.coordinates, strict=True):
            read = state.clone()
            for head in range(state.shape[1] if row is not None else 0):
                r, mean = ranks[row, head], made.adapter.mean[side][row, head]
                encode, decode = made.adapter.encode[side][row, head], made.adapter.decode[side][row, head]
                read[:, head] = mean + (state[:, head] - mean) @ encode[:, :r] @ decode[:r]
            for held, kept in ((whole, state), (states, read)):
                held.append(kept.repeat_interleave(query.shape[1] // state.shape[1], 1))
        logits = torch.where(exact, query @ whole[0].mT, query @ states[0].mT)
        weight = (logits * kwargs["scaling"] + mask).softmax(-1)
        return ((weight * exact) @ whole[1] + (weight * ~exact) @ states[1]).transpose(1, 2), None

    AttentionInterface.register("truncated", truncated)
    AttentionMaskInterface.register("truncated", AttentionMaskInterface()["eager"])
    stock = tiny_model(family)
    stock.set_attn_implementation("truncated")
    for lengths in ([40], [10, 30], [24, 5, *[1] * 11], [1] * 40):  # every path of attend
        block, ends = TOKENS_PER_BLOCK if window else 1, torch.arange(1, 41)
        recent = torch.tensor([recent_after(max(n - sinks, 0), window, block) for n in ends.tolist()])
        exact[:] = (torch.arange(40) < sinks) | (torch.arange(40) >= (ends - recent)[:, None])
        with torch.no_grad():
            expected = stock(input_ids=ids[:2, :40], use_cache=False).logits
        cache.reset()
        got = run(made.model, ids[:2, :40], cache, lengths)
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("budget", [1.0, *BUDGETS])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_chunks_is_token_by_token(fitted, ids, family, budget):
    made = fitted(family)
    outs = [
        run(made.model, ids[:2, :24], nested_cache(made.model, made.adapter, budget, paper=True), lengths)
        for lengths in ([24], [1] * 24, [3, 17, 4], [9, 15])
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=2e-3, atol=2e-3)


def test_the_first_prompt_is_exact_and_later_reads_are_not(fitted, ids):
    made = fitted("llama-gqa")
    with torch.no_grad():
        stock = made.stock(input_ids=ids[:1, :30]).logits
    out = run(made.model, ids[:1], nested_cache(made.model, made.adapter, 0.6, window=0), [29, 1])
    torch.testing.assert_close(out[:, :29], stock[:, :29])
    assert (out[:, 29] - stock[:, 29]).abs().max() > 1e-2


def test_a_window_keeps_recent_tokens_exact(fitted, ids):
    made = fitted("llama-gqa")
    table = {side: torch.full((3, 2), 8).tolist() for side in ("keys", "values")}
    with torch.no_grad():
        stock = made.stock(input_ids=ids[:1, :30]).logits
    kept = run(
        made.model, ids[:1], nested_cache(made.model, made.adapter, budget=table, sinks=4, window=26), [10] + [1] * 20
    )
    lost = run(
        made.model, ids[:1], nested_cache(made.model, made.adapter, budget=table, sinks=4, window=0), [10] + [1] * 20
    )
    torch.testing.assert_close(kept, stock, rtol=1e-3, atol=1e-3)
    assert (lost - stock).abs().max() > 0.1


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_padding_does_not_change_a_row(fitted, ids, budget):
    made = fitted("llama-gqa")
    pad = torch.tensor([0, 4, 9])
    mask = (torch.arange(24) >= pad[:, None]).long()
    padded = torch.stack([ids[0, :24].roll(int(p)) for p in pad]) * mask
    cache = nested_cache(made.model, made.adapter, budget, paper=True)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        first = made.model(
            input_ids=padded[:, :20],
            attention_mask=mask[:, :20],
            position_ids=positions[:, :20],
            **cached(made.model, cache),
        )
        second = made.model(
            input_ids=padded[:, 20:21],
            attention_mask=mask[:, :21],
            position_ids=positions[:, 20:21],
            **cached(made.model, cache),
        )
        third = made.model(
            input_ids=padded[:, 21:], attention_mask=mask, position_ids=positions[:, 21:], **cached(made.model, cache)
        )
    got = torch.cat([o.logits for o in (first, second, third)], 1)
    alone = run(made.model, ids[:1, :24], nested_cache(made.model, made.adapter, budget, paper=True), [20, 1, 3])
    for row, p in enumerate(pad.tolist()):
        torch.testing.assert_close(got[row, p:], alone[0, : 24 - p], rtol=1e-3, atol=1e-3)


def test_caches_of_several_budgets_serve_one_model_at_once(fitted, ids):
    made = fitted("llama-gqa")
    make = [lambda b=b: nested_cache(made.model, made.adapter, b, window=0) for b in (0.55, 0.75, 1.0)] + [
        lambda: DynamicCache()
    ]
    alone = [run(made.model, ids[:2, :24], new(), [20, 1, 1, 1, 1]) for new in make]
    caches = [new() for new in make]
    steps = [
        [run(made.model, ids[:2, a:b], c, [b - a]) for c in caches]
        for a, b in ((0, 20), (20, 21), (21, 22), (22, 23), (23, 24))
    ]
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([step[i] for step in steps], 1), expected)
    assert not torch.allclose(alone[0][:, -1], alone[2][:, -1], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_still_work_after_attaching(fitted, ids, family):
    made = fitted(family)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        for extra in ({}, {"attention_mask": mask}):
            expected = made.stock(input_ids=ids[:2, :24], use_cache=False, **extra).logits
            seen = mask.bool() if extra else torch.ones_like(mask).bool()
            got = made.model(input_ids=ids[:2, :24], use_cache=False, **extra).logits
            assert torch.equal(got[seen], expected[seen])
    dynamic = run(made.model, ids[:2, :24], DynamicCache(config=made.model.config), [20, 1, 3])
    assert torch.equal(dynamic, run(made.stock, ids[:2, :24], DynamicCache(config=made.stock.config), [20, 1, 3]))


# Verbs


@pytest.mark.parametrize("sinks", [0, 4, 12])
def test_crop_forgets(fitted, ids, sinks):
    """Also back into the sinks: 18 tokens less 8 leaves 10 of 12."""
    made = fitted("llama-gqa")
    new = lambda: nested_cache(made.model, made.adapter, 0.7, sinks=sinks, window=0, exact_prompt=False, context=999)  # noqa: E731
    cache = new()
    run(made.model, ids[:1, :18], cache, [15, 3])
    cache.crop(-8)
    assert cache.get_seq_length() == 10
    got = run(made.model, ids[1:2, :9], cache, [8, 1])
    again = new()
    expected = run(made.model, torch.cat((ids[:1, :10], ids[1:2, :9]), 1), again, [10, 8, 1])[:, 10:]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    cache.crop(-99)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)


def test_reset_is_a_new_cache(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.6, window=4)
    first = run(made.model, ids[:2, :24], cache, [20, 4])
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(run(made.model, ids[:2, :24], cache, [20, 4]), first)
    cache.reset()
    run(made.model, ids[:5, :24], cache, [20, 4])  # another batch


def test_a_prefilled_cache_can_be_copied_and_used_twice(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.6, window=0)
    run(made.model, ids[:1, :20], cache, [20])
    twin = copy.deepcopy(cache)
    one = run(made.model, ids[1:2, :4], cache, [1, 3])
    assert torch.equal(run(made.model, ids[1:2, :4], twin, [1, 3]), one)
    assert twin.get_seq_length() == 24


def test_rows_are_chosen_and_repeated_with_their_history(fitted, ids):
    made = fitted("llama-gqa")
    start = nested_cache(made.model, made.adapter, 0.6, window=3)
    run(made.model, ids[:3, :20], start, [20])
    expected = run(made.model, ids[3:6, :2], copy.deepcopy(start), [2])
    for verb, argument, index in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_select_indices", torch.tensor([False, True, True]), [1, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        cache = copy.deepcopy(start)
        getattr(cache, verb)(argument)
        assert cache.nbytes * 3 == start.nbytes * len(index)
        got = run(made.model, ids[3:6, :2][index], cache, [2])
        torch.testing.assert_close(got, expected[index], rtol=1e-4, atol=1e-4, msg=verb)


def test_verbs_on_an_empty_cache_do_nothing(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.6, window=0)
    cache.crop(0)
    for layer in cache.layers:
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0]))
        layer.reorder_cache(torch.tensor([0]))
    fresh = run(made.model, ids[:2, :9], nested_cache(made.model, made.adapter, 0.6, window=0), [9])
    assert torch.equal(run(made.model, ids[:2, :9], cache, [9]), fresh)


def test_misuse_is_refused(fitted, ids):
    made = fitted("llama-gqa")
    cache = nested_cache(made.model, made.adapter, 0.6, window=0)
    run(made.model, ids[:2, :9], cache, [9])
    with pytest.raises(kv.CacheMismatchError, match=r"\[2, 2, 16\] and was given \[3, 2, 16\]"):
        run(made.model, ids[:3, :1], cache, [1])
    twin = tiny_model("llama-gqa", seed=1)
    attach(twin)
    with pytest.raises(kv.CacheMismatchError, match="another model"):
        run(twin, ids[:2, :1], cache, [1])
    wider = tiny_model("llama-mha")
    attach(wider)
    with pytest.raises(kv.CacheMismatchError, match="4 heads"):
        run(wider, ids[:2, :9], nested_cache(made.model, made.adapter, 0.6, window=0), [9])
    other = tiny_model("qwen2")
    attach(other)
    with pytest.raises(kv.CacheMismatchError, match="another model"):
        run(other, ids[:2, :9], nested_cache(made.model, made.adapter, 0.6, window=0), [9])


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_switched_back_says_so(fitted, ids, family, implementation):
    made, model = fitted(family), tiny_model(family)
    cache = nested_cache(model, made.adapter, 0.6, window=0)
    model.set_attn_implementation(implementation)
    with pytest.raises(AttributeError, match="attention implementation is not 'nestling'"):
        run(model, ids[:2, :9], cache, [9])


# Bytes


def storages(root) -> dict[int, int]:
    """Address to bytes of every storage that can be reached from an object; models and configs are not entered."""
    found, seen, todo = {}, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, NestedCache | CacheLayerMixin | RankGroup | Buffer | ExactStore | LayerBases):
            todo += vars(item).values()
        elif isinstance(item, SideBasis | Coding):
            todo += [getattr(item, name) for name in item.__slots__]
        else:
            assert not hasattr(item, "__dict__") or isinstance(
                item, Allocation | LlamaConfig | CacheConfig | CacheFactory | torch.dtype | torch.device
            ), item
    return {address: size for address, size in found.items() if size}


SMOL = dict(num_hidden_layers=30, hidden_size=192, num_attention_heads=3, num_key_value_heads=3, head_dim=64)
CONTEXT = 4096


@pytest.fixture(scope="module")
def smol():
    """A model of 30 layers with 3 KV heads of 64, in bf16, and an adapter of random bases with decaying drop costs."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama-gqa", dtype=torch.bfloat16, **SMOL)
    encode = {s: torch.linalg.qr(torch.randn(30, 3, 64, 64, generator=generator))[0] for s in ("key", "value")}
    drop_cost = {s: torch.rand(30, 3, 64, generator=generator).sort(-1, descending=True)[0] ** 3 for s in encode}
    mean = {s: torch.randn(30, 3, 64, generator=generator) for s in encode}
    return model, kv.KVAdapter(fingerprint(model.config), encode, mean, drop_cost)


def fill(cache, tokens: int, batch: int = 1, piece: int = 512):
    for layer in cache.layers:
        for start in range(0, tokens, piece):
            n = min(piece, tokens - start)
            layer.update(*(torch.randn(batch, 3, n, 64, dtype=torch.bfloat16) for _ in range(2)))


@pytest.mark.parametrize(
    "budget, options",
    [
        (0.25, {"window": 0}),
        (0.5, {"window": 64}),
        (0.75, {"sinks": 0, "window": 0, "allocation": "uniform"}),
        (1.0, {}),
    ],
)
def test_bytes_meet_the_budget(smol, budget, options):
    model, adapter = smol
    cache = nested_cache(model, adapter, budget, context=CONTEXT, **options)
    bases = storages([layer.bases.sides for layer in cache.layers])
    means = storages([layer.bases.biases for layer in cache.layers])
    orders = storages([layer.order for layer in cache.layers])
    fill(cache, CONTEXT)
    full = 30 * 3 * 64 * 2 * 2 * CONTEXT
    held = {a: n for a, n in storages(cache).items() if a not in bases | means | orders}
    assert cache.nbytes == sum(held.values())
    assert cache.shared_nbytes == sum((bases | means).values())
    assert cache.full_nbytes == full
    slack = cache.allocation.bits // 8 * TOKENS_PER_BLOCK
    assert 0.97 * budget * full <= cache.nbytes <= budget * full + slack
    exact = capacity(options.get("sinks", 4), options.get("window", 64))
    stored = (CONTEXT - exact) * cache.allocation.bits // 8 + (exact * 30 * 3 * 64 * 4 if budget < 1 else 0)
    assert stored <= 1.001 * budget * full
    # no basis keeps more alive than its ranks need
    assert sum(bases.values()) <= 2 * 64 * cache.allocation.bits // 8  # 16 bits
    assert sum(means.values()) <= 2 * 30 * 3 * 64 * 4 and bool(means) == (budget < 1)


def test_every_storage_is_compact_and_in_the_precision_of_the_model(smol):
    model, adapter = smol
    cache = nested_cache(model, adapter, 0.4, window=32)
    fill(cache, 700)
    for row, layer in enumerate(cache.layers):
        assert len(layer.groups) <= 4
        assert sorted(h for g in layer.groups for h in g.heads) == [0, 1, 2]
        for group in layer.groups:
            for rows, ranks in zip(group.rows, cache.allocation.coordinates, strict=True):
                rank = int(ranks[row, group.heads[0]])
                places = 656  # for 644 or 660 tokens, and those of a block
                assert rows.data.shape == (len(group.heads), 1, rank, places)
                assert rows.data.dtype == torch.bfloat16
                assert rows.nbytes == len(group.heads) * places * rank * 2
        if layer.exact is not None:
            assert layer.exact.nbytes == sum(storages(layer.exact).values()) == 2 * 3 * capacity(4, 32) * 64 * 2


def test_a_stated_dtype_is_kept(fitted, ids):
    made = fitted("llama-gqa")
    half = nested_cache(made.model, made.adapter, 0.7, window=0, dtype=torch.bfloat16)
    same = nested_cache(made.model, made.adapter, 0.7, window=0)
    a, b = (run(made.model, ids[:1, :24], c, [20, 4]) for c in (half, same))
    assert {r.data.dtype for layer in half.layers for g in layer.groups for r in g.rows} == {torch.bfloat16}
    assert half.nbytes * 2 == same.nbytes
    assert 0 < (a - b).abs().max() < 0.5  # 8 bits of mantissa


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_room_is_for_an_eighth_more_at_most(tokens, until):
    places = room(tokens)
    assert places % 16 == 0 and tokens <= places <= tokens + max(15, tokens // 8)
    assert room(places) == places, "it is the same on the way there"
    met, last = room(tokens, until), -(-until // 16) * 16
    assert met == (places if tokens > last else min(places, last))


@pytest.mark.parametrize("by_token", [False, True])
def test_storage_grows_by_an_eighth_and_in_place(by_token):
    rows = Buffer(by_token=by_token)
    dim, shape = (2, (2, 2, 1, 3)) if by_token else (3, (2, 2, 3, 1))
    written, addresses = [], []
    for _ in range(300):
        written.append(torch.randn(shape))
        rows.append(written[-1], torch.float32)
        addresses.append((rows.data.data_ptr(), rows.data.shape[dim]))
        assert torch.equal(rows.view(), torch.cat(written, dim))
    sizes = list(dict.fromkeys(places for _, places in addresses))
    assert sizes == [*range(16, 257, 16), 288, 320], "by 16, from 256 tokens on by an eighth"
    for size in sizes:
        assert len({address for address, places in addresses if places == size}) == 1
    assert rows.nbytes == 320 * 2 * 2 * 3 * 4
    rows.append(torch.randn(shape).repeat_interleave(1700, dim), torch.float32)
    assert rows.data.shape[dim] == 2048 == room(2000)
    view = rows.view().clone()
    rows.crop(1900)
    assert rows.nbytes == 112 * 2 * 2 * 3 * 4 and torch.equal(rows.view(), view.narrow(dim, 0, 100))
    rows.crop(100)
    assert rows.nbytes == 0


RSS = """
import os
from pathlib import Path

import torch
from transformers import LlamaConfig
from nestling.kv.allocation.table import Allocation
from tests.kv.families import cache_of_bases

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
layers, heads, width, batch, rank = 30, 3, 64, 4, 24
config = LlamaConfig(num_hidden_layers=layers, hidden_size=576, num_attention_heads=9, num_key_value_heads=heads)
names = [f"{s}_{n}" for s in ("key", "value") for n in ("encode", "decode")]
bases = {i: {n: torch.eye(width).expand(heads, width, width) for n in names} for i in range(layers)}
ranks = torch.full((layers, heads), rank)
allocation = Allocation.of_ranks(ranks, ranks, width)
cache = cache_of_bases(bases, allocation, config, sinks=4, dtype=torch.bfloat16)
states = torch.randn(batch, heads, 1024, width, dtype=torch.bfloat16)
cache_of_bases(bases, allocation, config, dtype=torch.bfloat16).layers[0].update(states, states)  # code is loaded
before = rss()
for layer in cache.layers:
    for _ in range(4096 // 1024):
        layer.update(states, states)
print(rss() - before, cache.nbytes, cache.full_nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_really_is_smaller():
    places = os.pathsep.join(map(str, (Path(kv.__file__).parents[2], Path(__file__).parents[3])))
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed buffers go back to the system: no arenas in the measure
    done = subprocess.run([sys.executable, "-c", RSS], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    grown, nbytes, full = map(int, done.stdout.split())
    assert full == 30 * 3 * 64 * 2 * 2 * 4096 * 4
    assert nbytes < 0.39 * full
    assert 0.95 * nbytes < grown < 1.05 * nbytes
