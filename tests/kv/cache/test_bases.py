"""Bases: in 16 bits, once for all caches of an adapter and an allocation, and as exact as 16 bits are."""

import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from nestling.kv.cache import bases as module
from nestling.kv.cache.bases import LayerBases
from nestling.kv.cache.packed import Layout

from ..families import nested_cache
from .test_cache import random_bases


def pointers(cache) -> set[int]:
    """Of the bases that depend on the allocation: layers that are alike in two of them share theirs."""
    return {
        side.encode.data_ptr()
        for layer in cache.layers
        for pair in layer.bases.sides
        for side in pair
        if side.encode is not None
    }


def encodes(cache) -> list[torch.Tensor]:
    sides = [side for layer in cache.layers for pair in layer.bases.sides for side in pair]
    return [side.encode.float() for side in sides if side.encode is not None]


def new_cache(made, budget=0.6, **options):
    return nested_cache(made.model, made.adapter, budget, **{"dtype": torch.bfloat16, "context": 4096, **options})


def test_caches_of_an_adapter_and_an_allocation_share_bases(fitted):
    made = fitted("llama-gqa")
    one, other, smaller = new_cache(made), new_cache(made, exact_prompt=False), new_cache(made, 0.52)
    assert pointers(one) and pointers(one) == pointers(other)
    assert pointers(smaller) - pointers(one)
    assert not pointers(one) & pointers(new_cache(made, dtype=torch.float32)), "those are in fp32"
    assert one.shared_nbytes < 0.6 * new_cache(made, dtype=torch.float32).shared_nbytes
    other.shrink(0.52)
    assert pointers(other) == pointers(smaller)


def test_another_adapter_has_bases_of_its_own(fitted):
    made = fitted("llama-gqa")
    adapter = replace(made.adapter, encode={s: e * 2 for s, e in made.adapter.encode.items()})
    one, other = new_cache(made), nested_cache(made.model, adapter, 0.6, dtype=torch.bfloat16, context=4096)
    assert not pointers(one) & pointers(other)
    for first, second in zip(encodes(one), encodes(other), strict=True):
        torch.testing.assert_close(2 * first, second, rtol=1e-2, atol=1e-3)
    for side in adapter.encode:
        adapter.encode[side].mul_(2)
    changed = nested_cache(made.model, adapter, 0.6, dtype=torch.bfloat16, context=4096)
    for first, second in zip(encodes(other), encodes(changed), strict=True):
        torch.testing.assert_close(2 * first, second, rtol=1e-2, atol=1e-3)


def test_they_go_with_the_last_cache(fitted):
    made = fitted("llama-mha")
    gc.collect()
    before = len(module._shared)
    one, other = new_cache(made, 0.57), new_cache(made, 0.57)
    assert len(module._shared) == before + 3
    del one
    gc.collect()
    assert len(module._shared) == before + 3
    del other
    gc.collect()
    assert len(module._shared) == before


def test_threads_make_them_once(fitted):
    made = fitted("llama-mha")
    with ThreadPoolExecutor(8) as pool:
        caches = list(pool.map(lambda _: new_cache(made, 0.55), range(16)))
    assert len({frozenset(pointers(cache)) for cache in caches}) == 1


@torch.no_grad()
def test_copies_share_them_and_files_have_them(fitted, ids):
    made = fitted("llama-gqa")
    cache = new_cache(made)
    made.model(ids[:1, :40], past_key_values=cache)
    assert pointers(copy.deepcopy(cache)) == pointers(cache)
    written = pickle.dumps(cache)
    assert pointers(pickle.loads(written)) == pointers(cache)
    with io.BytesIO() as file:
        torch.save(cache, file)
        file.seek(0)
        assert pointers(torch.load(file, weights_only=False)) == pointers(cache)
    expected = [tensor.clone() for layer in cache.layers for tensor in layer.expand(torch.float32)]
    old = pointers(cache)
    del cache
    gc.collect()
    alone = pickle.loads(written)  # as in another process
    keep = [torch.zeros(1000) for _ in range(50)]
    assert alone.shared_nbytes and (pointers(alone) != old or keep)
    got = [tensor for layer in alone.layers for tensor in layer.expand(torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for layer in alone.layers:
        for pair, group in zip(layer.bases.sides, layer.groups, strict=True):
            assert all(a is b for a, b in zip(pair, group.bases, strict=True))


@pytest.mark.parametrize("blocks", [(16, 0, 0), (16, 16, 0)])
def test_what_is_read_is_the_inverse_of_what_is_written(blocks):
    """One of the two is rounded, and loses less than 16 bits of a coordinate do."""
    bases = random_bases(3, 24, torch.Generator().manual_seed(0), mean=1.0)
    members = [([0, 1, 2], (Layout.of(blocks, 24), Layout.of(blocks, 24)))]
    half, full = (LayerBases.of(bases, members, half) for half in (True, False))
    x = torch.randn(3, 500, 24, generator=torch.Generator().manual_seed(1))
    for side in (0, 1):
        read = []
        for made in (half, full):
            basis = made.sides[0][side]
            read.append(x @ basis.encode.float().mT @ basis.decode.float())
        assert half.sides[0][side].encode.dtype == half.sides[0][side].decode.dtype == torch.float16
        off = (read[0] - read[1]).square().mean().sqrt() / read[1].square().mean().sqrt()
        assert off < 2**-9


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_numbers_that_fp16_does_not_hold_stay_in_fp32(scale):
    bases = random_bases(2, 16, torch.Generator().manual_seed(0))
    bases["key_encode"], bases["key_decode"] = bases["key_encode"] * scale, bases["key_decode"] / scale
    members = [([0, 1], (Layout.of((16, 0), 16), Layout.of((16, 0), 16)))]
    ((keys, values),) = LayerBases.of(bases, members, half=True).sides
    assert (keys.encode.dtype, keys.decode.dtype) == (torch.float32, torch.float32)
    assert (values.encode.dtype, values.decode.dtype) == (torch.float16, torch.float16)
    x = torch.randn(2, 5, 16)
    expected = x @ bases["key_encode"][:, :, :8] @ bases["key_decode"][:, :8]
    torch.testing.assert_close(x @ keys.encode.mT @ keys.decode, expected, rtol=1e-3, atol=1e-3)
