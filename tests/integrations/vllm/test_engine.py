"""Engines of vLLM with a nested cache: what they write, how likely they find a text, how much they have room for."""

import dataclasses

import pytest
import torch

from nestling import kv
from nestling.errors import NestlingError
from nestling.integrations.vllm.config import PluginConfig, cache_config

from ...kv.families import tiny_model
from .conftest import BLOCK, CHUNK, INSTALLED, LENGTH, WINDOW, Tiny, engine, likelihoods, metric, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: make test-vllm has an environment for it"),
    pytest.mark.filterwarnings("ignore"),
]
BUDGET = 0.45


def test_full_rank_and_texts_within_the_window_are_those_of_stock_vllm(tiny):
    """An engine that nestling is installed beside, but not configured for, is stock: its layers have stock classes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    short, long = tiny.texts(1, 4, 9, 15, 20), tiny.texts(100, 333, 470)
    with engine(tiny) as llm:
        stock = write(llm, short, 8), write(llm, long)
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {type(layer.impl) for layer in context.values()} == {CPUAttentionBackendImpl}
    with engine(tiny, **tiny.nested(1.0)) as llm:
        assert (write(llm, short, 8), write(llm, long)) == stock
    with engine(tiny, **tiny.nested(BUDGET)) as llm:
        assert write(llm, short, 8) == stock[0]
        assert write(llm, long).ids != stock[1].ids, "or else this test shows nothing of compression"


@pytest.mark.parametrize("budget", [0.32, 0.6])
def test_likelihoods_are_those_of_a_nested_cache_in_transformers(tiny, budget):
    """The same options, whatever the chunks: vLLM reads 64 tokens at a time here, transformers 50."""
    (ids,) = tiny.texts(400)
    with engine(tiny, **tiny.nested(budget)) as llm:
        found = likelihoods(llm, ids)
    options = cache_config(PluginConfig(adapter=tiny.adapter_folder, budget=budget, window=WINDOW), LENGTH)
    cache = kv.NestedCache(tiny.model, tiny.adapter, dataclasses.replace(options, dtype="float32"))
    assert not all(cache.allocation.full)
    text = torch.tensor([ids])
    with torch.no_grad():
        logits = [tiny.model(text[:, i : i + 50], past_key_values=cache).logits for i in range(0, 400, 50)]
        stock = tiny.model(text).logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
    expected = torch.cat(logits, 1)[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((found - stock).abs().max()) > 1e-2, "compression is seen"


def test_hits_batches_and_chunks_change_nothing(tiny):
    """What is stored of a token depends on the text alone."""
    texts = tiny.texts(300, 290, 310, 280, 305, 150)
    texts += [texts[0][:200] + tail for tail in tiny.texts(60, 61, seed=1)]  # with the beginning of another
    with engine(tiny, **tiny.nested(BUDGET)) as llm:
        alone = [write(llm, [text], 40) for text in texts]
        assert [answer.cached[0] for answer in alone[:6]] == [0] * 6
        # vLLM keeps recent tokens where prompts end, and where it has seen two of them part.
        assert [answer.cached[0] > 100 for answer in alone[6:]] == [False, True]
        again = write(llm, texts, 40)
        assert all(cached >= len(text) - 2 * BLOCK for cached, text in zip(again.cached, texts, strict=True))
    ids = [answer.ids[0] for answer in alone]
    assert again.ids == ids, "from hits, together"
    with engine(tiny, **tiny.nested(BUDGET), max_num_batched_tokens=LENGTH, enable_prefix_caching=False) as llm:
        whole = write(llm, texts, 40)
        assert whole.ids == ids and not any(whole.cached), "in one piece, without hits"


def test_preemption_changes_nothing(tiny):
    texts = tiny.texts(60, 70, 80, 50, 90, 64)
    with engine(tiny, **tiny.nested(BUDGET)) as llm:
        free = write(llm, texts, 120)
        assert metric(llm, "preemptions") == 0
    with engine(tiny, **tiny.nested(BUDGET), num_gpu_blocks_override=75) as llm:
        assert write(llm, texts, 120).ids == free.ids
        assert metric(llm, "preemptions") > 0


def room(tiny: Tiny, budget: float) -> tuple[int, int]:
    """Blocks in a GiB, and tokens in requests of the greatest length, from the allocation alone."""
    options = cache_config(PluginConfig(adapter=tiny.adapter_folder, budget=budget, window=WINDOW), LENGTH)
    table = kv.NestedCache(tiny.model, tiny.adapter, dataclasses.replace(options, dtype="float32")).allocation
    ranks, (layers, heads, width) = table.coordinates[0, :, 0], tiny.adapter.shape
    rooms, compressed = [], layers - sum(table.full)
    for size in (16, 32):  # tokens in a block of exact ones: the divisors of a block of coordinates
        numbers = max(BLOCK * int(ranks.sum()), size * width)
        groups = -(-compressed // max(numbers // (size * width), 1))  # of exact layers, whose blocks are no larger
        blocks = 2**30 // (numbers * 2 * heads * 4)
        exact = groups * (-(-(WINDOW + 15 - 1 + CHUNK) // size) + 2)
        rooms.append((blocks, int(blocks / (LENGTH // BLOCK + exact) * LENGTH)))
    return max(rooms, key=lambda pair: pair[1])


@pytest.mark.parametrize("budget", [0.32, 0.6])
def test_room_is_what_the_allocation_says(tiny, budget):
    with engine(tiny, **tiny.nested(budget)) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert (cache.num_gpu_blocks, cache.kv_cache_size_tokens) == room(tiny, budget)
    with engine(tiny) as llm:
        assert llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens < room(tiny, budget)[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": "1%"}, r"budget='1%' is below the smallest possible, 0\.\d+ with"),
        ({"budget": "64MiB"}, "budget='64MiB' is a limit in bytes"),
        ({"rank": 32}, "nestling has 'rank', which is unknown: expected adapter, budget, window"),
        ({"window": 0}, "window=0"),
        ({"window": 600}, "must be longer than"),
        ({"adapter": ""}, "has no adapter"),
        ({"adapter": "no/folder"}, "no/folder"),
    ],
)
def test_options_that_cannot_be_are_refused_at_the_start(tiny, options, message):
    config = {"adapter": tiny.adapter_folder, **options}
    with pytest.raises(NestlingError, match=message):
        with engine(tiny, additional_config={"nestling": config}):
            pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float16"}, "dtype=torch.float16: .* expects bfloat16 or float32"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager is set"),
    ],
)
def test_what_is_not_served_is_refused_at_the_start(tiny, options, message):
    with pytest.raises(NestlingError, match=message):
        with engine(tiny, **tiny.nested(BUDGET), **options):
            pass


def test_an_adapter_of_another_model_is_refused_at_the_start(tiny, tmp_path):
    tiny_model("llama-gqa", num_hidden_layers=3, head_dim=32).save_pretrained(tmp_path)
    with pytest.raises(NestlingError, match="made for another model .*num_hidden_layers: adapter 4, model 3"):
        with engine(tiny, **tiny.nested(BUDGET), model=str(tmp_path), skip_tokenizer_init=True):
            pass
