"""A tiny model that chats, one token a character, with its adapter, and servers of it."""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nestling import kv
from nestling.integrations.serve.config import ServeConfig
from nestling.integrations.serve.server import serving

from ...kv.families import tiny_fit, tiny_model

CACHE = kv.CacheConfig(budget=0.4, sinks=2, window=4, context=256)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}"
    "{{ message.role[0] }}:{{ message.content }};{% endfor %}a:"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(string.printable[:90])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chat() -> SimpleNamespace:
    """``model``, ``tokenizer``, ``adapter``, and ``answer(text, tokens, cache)`` as ``generate`` gives it."""
    model, tokenizer = tiny_model("llama-gqa"), chat_tokenizer()
    model.name_or_path = model.config.name_or_path = "tiny"
    ids = torch.randint(3, 93, (8, 64), generator=torch.Generator().manual_seed(0))
    adapter = tiny_fit(model, ids, sensitivity_windows=8)

    def answer(text: str, tokens: int, cache: kv.CacheConfig = CACHE) -> str:
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with kv.bound(model, adapter, cache):
            out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return SimpleNamespace(model=model, tokenizer=tokenizer, adapter=adapter, answer=answer)


@pytest.fixture
def serve(chat):
    """``serve(**limits)``: a server for a block, as an OpenAI client that does not try again."""
    openai = pytest.importorskip("openai")

    @contextmanager
    def start(cache: kv.CacheConfig = CACHE, **limits) -> Iterator:
        config = ServeConfig(**{"port": 0, "max_new_tokens": 64, **limits})
        with serving(chat.model, chat.tokenizer, chat.adapter, cache, config) as url:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
                yield client

    return start


def metrics(client) -> dict[str, float]:
    """What the server counts, by name and labels."""
    import urllib.request

    url = str(client.base_url).replace("/v1/", "/metrics")
    with urllib.request.urlopen(url) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
