"""A model bound to an adapter: whoever calls generate gets a nested cache, a fresh one for each call."""

from inspect import signature

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, pipeline

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


@pytest.mark.parametrize(
    "ways",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 0.8},
    ],
    ids=lambda ways: next(iter(ways)),
)
def test_every_way_of_decoding_is_that_of_a_cache_handed_over(fitted, ids, model, watched, ways):
    adapter = fitted("llama-gqa").adapter
    tokens = ids[:1, :12].repeat(1, 3)  # there is something to look up
    options = OPTIONS | ways
    torch.manual_seed(0)
    expected = model.generate(tokens, **cached(model, kv.NestedCache(model, adapter, CONFIG)), **options)
    watched.clear()
    with kv.bound(model, adapter, CONFIG):
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(model.generate(tokens, **options), expected)
    assert len([cache for cache in watched if cache.get_seq_length()]) == 2


def test_a_chat_that_keeps_its_cache_reads_each_turn_once(fitted, ids, model, watched, monkeypatch):
    adapter, turns = fitted("llama-gqa").adapter, (ids[:1, :20], ids[1:2, :7], ids[2:3, :5])
    read, forward = [], type(model).forward

    def counted(self, input_ids=None, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    counted.__signature__ = signature(forward)
    with kv.bound(model, adapter, CONFIG):
        kept = kv.NestedCache(model, adapter, CONFIG)
        said, prompts = ids[:1, :0], []
        for turn in turns:
            said = torch.cat([said, turn], 1)
            said = model.generate(said, **cached(model, kept), **OPTIONS)
            prompts.append(max(read))
            read.clear()
            model.generate(turn, **OPTIONS)  # a question beside it has a cache of its own
            read.clear()
    assert prompts == [20, 8, 6]  # with the last token of the answer before
    assert kept.get_seq_length() == said.shape[1] - 1 == 20 + 7 + 5 + 3 * 8 - 1
    beside = [cache.get_seq_length() for cache in watched if cache is not kept]
    assert [length for length in beside if length] == [27, 14, 12]


def test_a_pipeline_chats(fitted, model, watched):
    adapter, words = fitted("llama-gqa").adapter, tokenizer()
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}w3"
    pipe = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    chat = [{"role": "user", "content": "w5 w17 w30 w8 w60 w44"}]
    with kv.bound(model, adapter, CONFIG):
        once = pipe(chat, **OPTIONS)[0]["generated_text"]
        assert pipe(chat, **OPTIONS)[0]["generated_text"] == once and once[-1]["role"] == "assistant"
        longer = pipe([*once, {"role": "user", "content": "w9"}], **OPTIONS)[0]["generated_text"]
    assert longer[: len(once)] == once
    assert len([cache for cache in watched if cache.get_seq_length()]) == 3


def test_a_cache_that_is_asked_for_by_its_kind_is_left_to_transformers(fitted, ids, model, watched):
    adapter = fitted("llama-gqa").adapter
    config = GenerationConfig(**OPTIONS, use_cache=False, pad_token_id=0, eos_token_id=2)
    with kv.bound(model, adapter, CONFIG):
        model.generate(ids[:1, :10], cache_implementation="static", **OPTIONS)
        model.generate(ids[:1, :10], config)  # by its place
    assert not [cache for cache in watched if cache.get_seq_length()]
