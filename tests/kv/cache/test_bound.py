"""A model bound to an adapter: whoever calls generate gets a nested cache, a fresh one for each call."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

from nestling import kv
from nestling.errors import AdapterError, BudgetError
from nestling.kv.integration.attach import cached, implementation

from ..families import tiny_model

CONFIG = kv.CacheConfig(budget=0.4, sinks=2, window=4, context=256)
OPTIONS = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.fixture
def model(fitted):
    made = fitted("llama-gqa")
    kv.detach(made.model)
    yield made.model
    kv.attach(made.model)


@pytest.fixture
def watched(monkeypatch):
    """The caches that are made."""
    made, init = [], kv.NestedCache.__init__

    def record(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(kv.NestedCache, "__init__", record)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", padding_side="left")


def test_every_call_has_a_fresh_cache(fitted, ids, model, watched):
    adapter, stock = fitted("llama-gqa").adapter, fitted("llama-gqa").stock
    tokens = ids[:2, :20]
    expected = model.generate(tokens, **cached(model, kv.NestedCache(model, adapter, CONFIG)), **OPTIONS)
    kv.detach(model)
    full = model.generate(tokens, **OPTIONS)
    generate = model.generate
    watched.clear()
    with kv.bound(model, adapter, CONFIG):
        for _ in range(2):
            assert torch.equal(model.generate(tokens, **OPTIONS), expected)
        filled = [cache for cache in watched if cache.get_seq_length()]
        assert [cache.get_seq_length() for cache in filled] == [27, 27] and filled[0] is not filled[1]
        assert torch.equal(model.generate(inputs=tokens, use_cache=False, **OPTIONS), full)
        own = DynamicCache(config=model.config)
        assert torch.equal(model.generate(tokens, **cached(model, own), **OPTIONS), full)
        assert own.get_seq_length() == 27
    assert implementation(model) != "nestling" and "generate" not in vars(model)
    assert model.generate == generate and torch.equal(model.generate(tokens, **OPTIONS), full)
    assert torch.equal(stock.generate(tokens, **OPTIONS), full)


def test_a_pipeline_is_served_twice_and_in_a_batch(fitted, model, watched):
    adapter = fitted("llama-gqa").adapter
    texts = ["w5 w17 w30 w8 w60 w44 w9 w12 w71 w20", "w9 w33 w41 w7 w18 w29 w50 w3 w11 w26"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    with kv.bound(model, adapter, CONFIG):
        alone = [pipe(text, **OPTIONS)[0]["generated_text"] for text in texts]
        assert [pipe(text, **OPTIONS)[0]["generated_text"] for text in texts] == alone
        together = [rows[0]["generated_text"] for rows in pipe(texts, batch_size=2, **OPTIONS)]
    assert together == alone and all(len(text.split()) > 14 for text in alone)
    filled = [cache for cache in watched if cache.get_seq_length()]
    assert [cache.layers[0].batch for cache in filled] == [1, 1, 1, 1, 2]


def test_what_was_there_is_put_back_also_after_errors(fitted, ids, model):
    adapter = fitted("llama-gqa").adapter
    model.generate = generate = lambda *args, **kwargs: kwargs
    try:
        with pytest.raises(KeyboardInterrupt), kv.bound(model, adapter, 0.5):
            assert isinstance(next(iter(model.generate().values())), kv.NestedCache)
            raise KeyboardInterrupt
        assert model.generate is generate
    finally:
        del model.generate
    with pytest.raises(BudgetError, match="below the smallest"), kv.bound(model, adapter, 0.001):
        pytest.fail("a budget out of reach was taken")
    other = tiny_model("llama-mha")
    with pytest.raises(AdapterError), kv.bound(other, adapter):
        pytest.fail("another model was taken")
    assert "generate" not in vars(model) and implementation(model) != "nestling"


def test_a_bound_model_can_be_bound_again(fitted, ids, model, watched):
    adapter = fitted("llama-gqa").adapter
    with kv.bound(model, adapter, 0.5):
        with kv.bound(model, adapter, 0.25):
            model.generate(ids[:1, :10], **OPTIONS)
        model.generate(ids[:1, :10], **OPTIONS)
    assert [cache.budget for cache in watched if cache.get_seq_length()] == [0.25, 0.5]
