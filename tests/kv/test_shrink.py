"""Caches made smaller while in use, against fresh ones of the smaller budget that are given the same tokens."""

import copy
from functools import cache as memoize

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling import kv
from nestling.errors import BudgetError
from nestling.kv import attention
from nestling.kv.evaluate import held_bytes
from nestling.kv.layer import NestedLayer

from .families import tiny_model

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
    energy = {s: torch.rand(shape, generator=rng) * torch.rand(LAYERS, HEADS, 1, generator=rng) ** 2 for s in encode}
    step = {s: torch.full(shape, 2.0) for s in encode}
    info = {"errors": {s: [0.4, 0.12, 0.04, 0.01, 0.001] for s in encode}}
    noise = {s: 2 * e for s, e in energy.items()}
    fingerprint = attention.fingerprint(model.config)
    return model, kv.KVAdapter(fingerprint, encode, mean, energy, info, noise=noise, step=step)


def make(budget, **options) -> kv.NestedCache:
    model, adapter = made()
    return adapter.cache(model, budget, **{"context": 1000, "chunk": 4, "dtype": torch.bfloat16, **options})


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
                done[:] = [("append", keys[:, :, : -count or None], values[:, :, : -count or None])] if done else []
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
        fresh = make(self.cache.budget, **{k: v for k, v in self.options.items() if k != "limit_mib"})
        assert torch.equal(fresh.ranks.stacked, self.cache.ranks.stacked)
        for done, layer, other in zip(self.done, self.cache.layers, fresh.layers, strict=True):
            for what, *given in done:
                {"append": other.update, "crop": other.crop, "rows": other.batch_select_indices}[what](*given)
            assert layer.get_seq_length() == other.get_seq_length()
            assert [(g.heads, g.layouts) for g in layer.groups] == [(g.heads, g.layouts) for g in other.groups]
            if not layer.length:
                continue
            for one, another in zip(layer.expand(torch.float32), other.expand(torch.float32), strict=True):
                assert torch.equal(one, another)
            assert (layer.exact and layer.exact.length) == (other.exact and other.exact.length)
        if not self.cropped:  # chunks are kept for the next tokens
            assert self.cache.nbytes == fresh.nbytes == held_bytes(self.cache)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30), st.integers(0, 999)),
    st.tuples(st.just("append"), st.just(1), st.integers(0, 999)),
    st.tuples(st.just("shrink"), st.floats(0.3, 1.0)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["reset", "copy"])),
)
KINDS = st.fixed_dictionaries(
    {"bits": st.booleans(), "sinks": st.sampled_from([0, 0, 2, 5]), "window": st.sampled_from([0, 0, 3, 20])}
)


def carry_out(followed: Followed, operation: tuple) -> None:
    what, *given_ = operation
    if what == "shrink":
        budget = given_[0] * followed.cache.budget
        before = followed.cache.budget, followed.cache.nbytes
        try:
            followed.cache.shrink(budget)
            assert followed.cache.nbytes <= before[1] or followed.cache.get_seq_length() < 40  # an exact store is made
        except BudgetError:
            assert budget < followed.cache.remake.smallest and before == (followed.cache.budget, followed.cache.nbytes)
    elif what == "rows":
        followed.rows(torch.tensor(given_[0]) % followed.batch)
    elif what == "copy":
        followed.cache = copy.deepcopy(followed.cache)
    else:
        getattr(followed, what)(*given_)


@settings(deadline=None, max_examples=120)
@given(start=st.sampled_from([1.0, 0.9, 0.7]), kind=KINDS, operations=st.lists(OPERATIONS, min_size=3, max_size=40))
@torch.no_grad()
def test_whatever_is_done_a_cache_holds_what_a_smaller_one_would(start, kind, operations):
    followed = Followed(start, **kind)
    for operation in operations:
        carry_out(followed, operation)
        if operation[0] in ("shrink", "reset"):
            followed.check()
    followed.check()


@settings(deadline=None, max_examples=60)
@given(kib=st.integers(10, 60), kind=KINDS, operations=st.lists(OPERATIONS, min_size=3, max_size=40))
@torch.no_grad()
def test_a_limit_holds_whatever_is_done(kib, kind, operations):
    try:
        followed = Followed(1.0, limit_mib=kib / 1024, **kind)
    except BudgetError:
        return
    for operation in operations:
        before = followed.cache.get_seq_length(), followed.cache.budget
        try:
            carry_out(followed, operation)
        except BudgetError as error:
            assert f"limit_mib={kib / 1024}" in str(error)
            assert before == (followed.cache.get_seq_length(), followed.cache.budget)
            break
        assert held_bytes(followed.cache) <= kib * 1024
    followed.check()
    followed.cache.reset()
    assert followed.cache.budget == 1.0 and followed.cache.limit == kib * 1024
