"""SmolLM2 with the adapter of the package: a long prompt, answered at two budgets as ``generate`` answers it."""

import pytest

from nestling import KVAdapter, kv
from nestling.data import read_texts
from nestling.integrations.serve.server import serving
from nestling.models import load_model

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_answers_as_generate_does():
    model, tokenizer = load_model("smollm2")
    adapter = KVAdapter.from_pretrained("smollm2")
    page = "".join(read_texts(None))[:3000]
    messages = [{"role": "user", "content": f"{page}\n\nWhat is this text about? Answer in one sentence, with a “—”."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ask = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 24}
    with serving(model, tokenizer, adapter, kv.CacheConfig(budget="25%")) as url:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**ask)
            chunks = list(client.chat.completions.create(**ask, stream=True, extra_body={"nestling": {"budget": 0.1}}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    for budget, told, answer in (
        (0.25, whole.nestling, whole.choices[0].message.content),
        (0.1, chunks[-1].nestling, streamed),
    ):
        cache = kv.NestedCache(model, adapter, budget)
        out = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=24)
        assert answer == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert told == {"budget": budget, "cache_bytes": cache.nbytes, "full_cache_bytes": cache.full_nbytes}
    assert whole.usage.prompt_tokens == inputs["input_ids"].shape[1] > 600
