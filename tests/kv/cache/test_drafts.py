"""Drafts of several tokens, of which some are taken back: nothing shows that they were there."""

import copy
from types import SimpleNamespace

import pytest
import torch

from nestling.kv.cache.layer import RECORDED
from nestling.kv.cache.rule import capacity
from nestling.kv.cache.window import TOKENS_PER_BLOCK

from ..families import nested_cache, tiny_fit, tiny_model

WINDOW, SINKS = 8, 2
CACHES = {
    "full": dict(budget=1.0),
    "ranks": dict(budget=0.6),
    "bits": dict(budget=0.4, quantise=True),
    "compressed prompt": dict(budget=0.4, quantise=True, exact_prompt=False),
    "no window": dict(budget=0.4, quantise=True, window=0),
}


def new_cache(made, name: str, **options):
    base = {"context": 256, "sinks": SINKS, "window": WINDOW}
    return nested_cache(made.model, made.adapter, **{**base, **CACHES[name], **options})


def recent(cache) -> int:
    store = next(layer.exact for layer in cache.layers if getattr(layer, "exact", None) is not None)
    return store.length - store.first


def same_state(one, other) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        if not hasattr(a, "groups"):
            continue
        assert (a.length, a.groups[0].length) == (b.length, b.groups[0].length)
        assert (a.exact is None) == (b.exact is None)
        if a.exact is not None:
            assert (a.exact.length, a.exact.left) == (b.exact.length, b.exact.left)
            assert a.exact.size <= b.exact.capacity(b.length), "what the drafts took is given back"
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            far = ~torch.isclose(x.float(), y.float(), rtol=1e-2, atol=1e-2)
            assert far.float().mean() < 0.01, "more than rounding errors at borders of cells"


@pytest.fixture(scope="module")
def single(ids):
    """A model of one layer: behind it, states that differ by a rounding error fall into other cells."""
    model = tiny_model("llama-gqa", num_hidden_layers=1)
    return SimpleNamespace(model=model, adapter=tiny_fit(model, ids))


@pytest.mark.parametrize("rejected", [0, 5, 15, 30])
@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_a_draft_reads_what_tokens_one_by_one_read(fitted, single, ids, name, rejected):
    """The logits of every position of a call, and what is stored after it, over all places of a border."""
    made = fitted("llama-gqa") if name in ("full", "ranks") else single
    text, other, start = ids[0], ids[1], 33
    drafted, plain = new_cache(made, name), new_cache(made, name)
    for cache in (drafted, plain):
        made.model(input_ids=text[None, :start], past_key_values=cache)
    while start < 55:
        ends = text[start : start + 2]  # two are right, the others are not
        call = torch.cat((ends, other[:rejected]))[None]
        got = made.model(input_ids=call, past_key_values=drafted).logits[0]
        expected = [made.model(input_ids=token[None, None], past_key_values=plain).logits[0] for token in ends]
        torch.testing.assert_close(got[:2], torch.cat(expected), rtol=2e-3, atol=2e-3)
        wrong = copy.deepcopy(plain)
        for place in range(rejected if start % 3 == 0 else 0):
            alone = made.model(input_ids=other[None, None, place], past_key_values=wrong).logits[0, 0]
            torch.testing.assert_close(got[2 + place], alone, rtol=2e-3, atol=2e-3)
        drafted.crop(-rejected)
        start += 2
        same_state(drafted, plain)


@pytest.mark.parametrize("candidates", [1, 3, 10, 20])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma3"])
def test_prompt_lookup_writes_the_same_text(fitted, ids, family, name, candidates):
    made, found = fitted(family), []
    prompt = ids[:1, :13].repeat(1, 3)  # something to look up from the first call on
    for extra in ({}, {"prompt_lookup_num_tokens": candidates}):
        cache = new_cache(made, name)
        text = made.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
            min_new_tokens=40, max_new_tokens=40, **extra,
        )  # fmt: skip
        found.append((text, cache))
    assert torch.equal(found[0][0], found[1][0])
    if found[0][1].get_seq_length() == found[1][1].get_seq_length():
        same_state(found[1][1], found[0][1])
    assert not made.model._forward_pre_hooks


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("sampled", [False, True])
def test_an_assistant_changes_nothing(fitted, ids, name, sampled):
    """A good assistant, so that drafts are long and are accepted, and a bad one."""
    made = fitted("llama-gqa")
    good, bad = tiny_model("llama-gqa"), tiny_model("llama-mha", seed=7, num_hidden_layers=1)
    with torch.no_grad():
        good.lm_head.weight += 0.05 * torch.randn(
            good.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    # Where every token is coded at once, a rounding error of drafts that are read together can move a state into
    # another cell: this text has none near a border.
    prompt, texts = ids[1:2, :25] if name == "no window" else ids[:1, :25], []
    for assistant in (None, good, bad):
        cache = new_cache(made, name)
        torch.manual_seed(0)
        text = made.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=sampled,
            assistant_model=assistant, min_new_tokens=40, max_new_tokens=40,
        )  # fmt: skip
        texts.append(text)
        if name != "full" and name != "no window":
            assert recent(cache) >= WINDOW
    assert sampled or all(torch.equal(text, texts[0]) for text in texts)


class Drafting:
    """A model that drafts with a cache of its own, as an assistant of transformers."""

    def __init__(self, model, cache):
        self.model, self.cache, self.seen = model, cache, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, **kwargs):
        if self.cache.get_seq_length() > 30:
            self.seen.append(recent(self.cache))
        return self.model.generate(**{**kwargs, "past_key_values": self.cache})


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["ranks", "bits"])
def test_an_assistant_may_have_a_nested_cache(fitted, ids, name, recorded):
    """It writes its drafts one by one, and takes back what was not accepted some calls later."""
    made, target = fitted("llama-gqa"), tiny_model("qwen2", seed=3)
    cache = new_cache(made, name)
    if recorded:
        cache.activate_past_recording()
    assistant, prompt = Drafting(made.model, cache), ids[:1, :25]
    made.model.generation_config.num_assistant_tokens = 12
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=40, max_new_tokens=40)
    text = target.generate(prompt, assistant_model=assistant, **options)
    assert torch.equal(text, target.generate(prompt, **options))
    assert len(assistant.seen) > 5 and min(assistant.seen) >= WINDOW


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CACHES)
def test_a_loop_of_ones_own_in_every_mode(fitted, ids, name, mode):
    """Greedy decoding with drafts of random length that are right up to a random place, against plain decoding."""
    made, generator = fitted("llama-gqa"), torch.Generator().manual_seed(5)
    prompt = ids[:1, :30]
    with mode():
        plain = new_cache(made, name)
        tokens, last = [], made.model(input_ids=prompt, past_key_values=plain).logits[:, -1:].argmax(-1)
        for _ in range(60):
            tokens.append(int(last))
            last = made.model(input_ids=last, past_key_values=plain).logits[:, -1:].argmax(-1)
        cache, done = new_cache(made, name), 0
        made.model(input_ids=prompt, past_key_values=cache)
        while done < 45:
            right, wrong = (int(torch.randint(0, 13, (1,), generator=generator)) for _ in range(2))
            draft = tokens[done : done + 1 + right] + ids[2, :wrong].tolist()
            out = made.model(input_ids=torch.tensor([draft]), past_key_values=cache).logits[0].argmax(-1).tolist()
            assert out[: 1 + right] == tokens[done + 1 : done + 2 + right]
            cache.crop(-wrong)
            done += 1 + right
            assert cache.get_seq_length() == 30 + done
            if name not in ("full", "no window"):
                assert recent(cache) >= WINDOW


def test_room_for_drafts_is_counted_and_given_back(fitted, ids):
    made = fitted("llama-gqa")
    cache = new_cache(made, "ranks")
    base = capacity(SINKS, WINDOW)
    token = 2 * 2 * 16 * 4
    with torch.no_grad():
        made.model(input_ids=ids[:2].reshape(1, -1), past_key_values=cache)  # long enough for free places
        assert cache.layers[0].exact.nbytes == base * token
        made.model(input_ids=ids[:1, :20], past_key_values=cache)
        store = cache.layers[0].exact
        assert base < store.size <= base + 20 and store.nbytes == store.size * token
        cache.crop(-19)
        assert cache.layers[0].exact.nbytes == base * token
        cache.activate_past_recording()
        for token_id in ids[0, :30]:
            made.model(input_ids=token_id[None, None], past_key_values=cache)
        assert cache.layers[0].exact.size > base
        cache.crop(0)
        assert cache.layers[0].exact.size == base
        made.model(input_ids=ids[:1].reshape(1, -1).repeat(1, 3)[:, : RECORDED + 30], past_key_values=cache)
        assert cache.layers[0].exact.size <= base + RECORDED
        for token_id in ids[0, :4]:  # and if nothing is ever taken back
            made.model(input_ids=token_id[None, None], past_key_values=cache)
        assert cache.layers[0].exact.size == base and not cache.layers[0].record_past


def test_a_limit_holds_with_drafts(fitted, ids):
    made = fitted("llama-gqa")
    limit = int(0.045 * 2**20)
    cache = nested_cache(made.model, made.adapter, limit="0.045MiB", quantise=True, sinks=2, window=3, context=400)
    prompt = ids[:1, :13].repeat(1, 5)
    with torch.no_grad():
        for _ in range(30):
            made.model(input_ids=prompt[:, :20], past_key_values=cache)
            assert cache.nbytes <= limit
            cache.crop(-9)
    assert cache.get_seq_length() == 330 and cache.budget < 1


@pytest.mark.parametrize("extra", [{}, {"prompt_lookup_num_tokens": 5}, {"num_beams": 2}])
def test_evicting_caches_go_on_through_drafts(fitted, ids, extra):
    made = fitted("llama-gqa")
    prompt = ids[:1, :20].repeat(1, 4)
    for name in ("ranks", "bits", "full"):
        cache = new_cache(made, name, keep_tokens=0.4)
        text = made.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
            min_new_tokens=80, max_new_tokens=80, **extra,
        )  # fmt: skip
        layer = cache.layers[0]
        assert text.shape[1] == 160 and layer.hitters.evicted > 0
        assert layer.hitters.mass.shape[-1] == layer.held == layer.keys.shape[2]


def test_far_steps_back_leave_a_shorter_window_that_fills_again(fitted, ids):
    """What was encoded long ago cannot be made exact: documented, and over after some tokens."""
    made = fitted("llama-gqa")
    cache = new_cache(made, "ranks")
    with torch.no_grad():
        made.model(input_ids=ids[:1, :60], past_key_values=cache)
        cache.crop(-40)
        assert recent(cache) == 0 and cache.get_seq_length() == 20
        for count in range(1, WINDOW + TOKENS_PER_BLOCK):
            made.model(input_ids=ids[1:2, count : count + 1], past_key_values=cache)
            assert recent(cache) == min(count, WINDOW + (20 + count - SINKS - WINDOW) % TOKENS_PER_BLOCK)
