"""Eviction against stock models: what was read, what is kept, and what later tokens see."""

import pytest
import torch

from nestling import kv
from nestling.errors import OptionError
from nestling.kv.cache import eviction as evict
from nestling.kv.cache.eviction import HeavyHitters, attention_mass
from nestling.kv.integration.attach import cached

from ..families import nested_cache, tiny_fit, tiny_model


@pytest.fixture(autouse=True)
def little_slack(monkeypatch):
    monkeypatch.setattr(evict, "SLACK", 4)


@pytest.fixture(scope="module")
def single(ids):
    """A model of one layer, whose heads can be given masks of their own, its adapter, and an eager twin."""
    model, stock = (tiny_model("llama-gqa", num_hidden_layers=1) for _ in range(2))
    stock.set_attn_implementation("eager")
    return (
        model,
        tiny_fit(model, ids, sensitivity_windows=8),
        stock,
    )


@torch.no_grad()
def weights(stock, text, mask=None) -> torch.Tensor:
    """Attention weights ``[B, Hkv, G, T, T]`` of an eager model's only layer."""
    found = stock(input_ids=text, attention_mask=mask, output_attentions=True).attentions[0]
    return found.unflatten(1, (2, -1))


@pytest.mark.parametrize("block", [5, 256])
@torch.no_grad()
def test_mass_is_the_sum_of_the_weights(single, ids, monkeypatch, block):
    model, adapter, stock = single
    monkeypatch.setattr(evict, "QUERY_BLOCK", block)
    cache = nested_cache(model, adapter, 1.0, keep_tokens=0.99, sinks=0, window=0)
    text, mask = ids[:3, :30], torch.ones(3, 30, dtype=torch.long)
    mask[1, :7] = 0
    model(input_ids=text, attention_mask=mask, **cached(model, cache))
    expected = weights(stock, text, mask)
    expected[1, :, :, :7] = 0  # padding's own queries read something or other
    mass = cache.layers[0].hitters.mass.transpose(0, 1)
    torch.testing.assert_close(mass[[0, 2]], expected[[0, 2]].sum((2, 3)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_both_ways_of_reading_count_alike(fitted, ids):
    """Token by token the weights are those of coordinates, in chunks of 20 those of decoded keys."""
    case, found = fitted("qwen3"), []
    for chunk in (1, 20):
        cache = nested_cache(case.model, case.adapter, 0.7, keep_tokens=0.999, sinks=2, window=8, exact_prompt=False)
        for part in ids[:2, :60].split(chunk, 1):
            case.model(input_ids=part, **cached(case.model, cache))
        found.append([layer.hitters.mass for layer in cache.layers])
    assert found[0][0].shape == (2, 2, 60)
    for one, many in zip(*found, strict=True):
        assert one.sum() == pytest.approx(2 * 4 * 60, rel=1e-4)
        torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget, window", [(1.0, 0), (1.0, 6), (0.99, 6)])
@torch.no_grad()
def test_later_tokens_see_the_most_read_ones(single, ids, budget, window):
    """Against the eager model under a mask for each head, made from its own weights."""
    model, adapter, stock = single
    sinks, text, after = 2, ids[:2, :40], ids[:2, 40:44]
    options = {"budget": budget}
    if budget < 1:  # one head's values are compressed, so that there is an exact store
        options = {"budget": {"keys": [[16, 16]], "values": [[16, 8]]}}
    cache = nested_cache(model, adapter, keep_tokens=0.5, sinks=sinks, window=window, **options)
    model(input_ids=text, **cached(model, cache))
    layer = cache.layers[0]
    recent = layer.exact.length - sinks if layer.exact is not None else window
    allowed = 20 - sinks - recent
    mass = weights(stock, text).sum((2, 3))  # [B, Hkv, T]
    top = mass[..., sinks : 40 - recent].topk(allowed).indices + sinks
    alive = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, top, True)
    alive[..., :sinks] = True
    alive[..., 40 - recent :] = True
    assert layer.hitters.mass.shape == (2, 2, 20) and layer.get_seq_length() == 40
    assert layer.get_mask_sizes(1) == (21, 20)
    if budget < 1:
        return
    for step in range(4):
        length = 41 + step
        seen = torch.cat((alive, torch.ones(2, 2, step + 1, dtype=torch.bool)), -1)
        mask = torch.ones(length, length).tril().bool().expand(2, 4, length, length).clone()
        mask[:, :, -1] = seen.repeat_interleave(2, 1)
        for early in range(step):  # the tokens after the eviction saw as little
            mask[:, :, 40 + early, :40] = alive.repeat_interleave(2, 1)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = stock(input_ids=torch.cat((text, after[:, : step + 1]), 1), attention_mask=bias).logits[:, -1]
        got = model(input_ids=after[:, step : step + 1], **cached(model, cache)).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_shares_of_tokens_and_coordinates_multiply_in_bytes(fitted, ids):
    case = fitted("llama-gqa")
    text, sizes = ids.reshape(1, -1)[:, :500], {}
    for share in (1.0, 0.5):
        cache = nested_cache(case.model, case.adapter, 0.75, keep_tokens=share, sinks=2, window=8)
        case.model(input_ids=text, **cached(case.model, cache))
        mass = sum(0 if layer.hitters is None else layer.hitters.nbytes for layer in cache.layers)
        sizes[share] = cache.nbytes - mass
        assert cache.get_seq_length() == 500 and cache.full_nbytes == 500 * 3 * 2 * 2 * 16 * 4
    assert mass == 3 * 2 * 250 * 4
    assert sizes[0.5] == pytest.approx(0.5 * sizes[1.0], rel=0.06)


def test_generation_goes_on_and_evicts(fitted, ids):
    case = fitted("llama-gqa")
    for extra in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        cache = nested_cache(case.model, case.adapter, 0.75, keep_tokens=0.4, sinks=2, window=4)
        inputs = {"input_ids": ids[:2, :50], "attention_mask": torch.ones(2, 50, dtype=torch.long)}
        inputs["attention_mask"][0, :9] = 0
        out = case.model.generate(**inputs, **cached(case.model, cache), max_new_tokens=30, pad_token_id=0, **extra)
        assert out.shape[1] > 50
        layer = cache.layers[0]
        held = layer.length - layer.hitters.evicted
        assert held <= 0.4 * layer.length + 1 + evict.SLACK + 2 + 4 + 16 and layer.hitters.evicted > 20


@torch.no_grad()
def test_padding_is_evicted_first(single, ids):
    """A padded row gives what the row alone gives, as long as no more than the padding is evicted."""
    model, adapter, _ = single
    row = ids[:1, :30]
    padded = torch.cat((torch.zeros(1, 10, dtype=torch.long), row), 1)
    mask = (torch.arange(40) >= 10).long()[None]
    cache = nested_cache(model, adapter, 1.0, keep_tokens=0.75, sinks=0, window=0)
    model(
        input_ids=padded,
        attention_mask=mask,
        **cached(model, cache),
        position_ids=(torch.arange(40) - 10).clamp_min(0)[None],
    )
    assert cache.layers[0].hitters.evicted == 10
    new = ids[:1, 30:31]
    got = model(input_ids=new, attention_mask=torch.ones(1, 41).index_fill(1, torch.arange(10), 0).long(),
                **cached(model, cache), position_ids=torch.tensor([[30]])).logits[:, -1]  # fmt: skip
    expected = model(input_ids=ids[:1, :31], use_cache=False).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_was_evicted_cannot_be_taken_back(fitted, ids):
    case = fitted("llama-gqa")
    cache = nested_cache(case.model, case.adapter, 0.75, keep_tokens=0.5, sinks=2, window=8)
    case.model(input_ids=ids[:1, :60], **cached(case.model, cache))
    cache.crop(-5)
    assert cache.get_seq_length() == 55 and cache.layers[0].hitters.mass.shape[-1] == 25
    with pytest.raises(kv.CacheMismatchError, match="before them some were evicted"):
        cache.crop(-30)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].hitters.evicted == 0
    case.model(input_ids=ids[:2, :10], **cached(case.model, cache))
    assert cache.get_seq_length() == 10


def test_choice_by_hand():
    hitters = HeavyHitters(0.5, 1, 2)
    hitters.add(torch.tensor([9.0, 5, 1, 7, 2, 8, 3, 6, 4, 0, 1, 1]).expand(1, 1, -1).clone())
    assert hitters.choose(16, 1, 2) is None  # 9 between the ends, 5 allowed, 4 of slack
    hitters.reset()
    hitters.add(torch.tensor([9.0, 5, 1, 7, 2, 8, 3, 6, 4, 0, 1, 1]).expand(1, 1, -1).clone())
    assert hitters.choose(12, 1, 2).tolist() == [[[2, 4, 6]]]
    assert hitters.mass.tolist() == [[[9, 7, 8, 6, 1, 1]]] and hitters.evicted == 6
    hitters.add(torch.ones(1, 1, 7))
    assert hitters.mass.tolist() == [[[10, 8, 9, 7, 2, 2, 1]]]


@pytest.mark.parametrize("tokens", [0, -1, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(fitted, tokens):
    case = fitted("llama-gqa")
    with pytest.raises(OptionError, match="tokens="):
        nested_cache(case.model, case.adapter, 0.75, keep_tokens=tokens)


def test_mass_needs_no_cache():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    score = (query.view(2, 2, 2, 3, 8) @ keys[:, :, None].mT) * 0.3
    causal = torch.arange(9) > torch.arange(6, 9)[:, None]
    expected = score.masked_fill(causal, -torch.inf).softmax(-1).sum((2, 3)).transpose(0, 1)
    torch.testing.assert_close(attention_mass(query, keys, None, 0.3), expected)
