"""What a client may send: what is served, what changes nothing, and what is refused with a reason."""

import json

import pytest

from nestling.integrations.serve.request import RequestError, read_request
from nestling.kv.cache.config import CacheConfig

CACHE = CacheConfig(budget=0.25, window=32)


def read(**given):
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **given}
    return read_request(json.dumps({k: v for k, v in body.items() if v != "left out"}).encode(), "m", CACHE)


def test_what_a_request_says_nothing_of_is_left_to_model_and_server():
    asked = read()
    assert asked.messages == [{"role": "user", "content": "hello"}] and asked.cache == CACHE
    assert (asked.max_tokens, asked.sampling, asked.seed, asked.stop) == (None, {}, None, ())
    assert not asked.stream and not asked.include_usage


def test_what_it_says_is_read():
    asked = read(
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        max_completion_tokens=7, max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop="x", stream=True,
        stream_options={"include_usage": True}, nestling={"budget": "12.5%"},
    )  # fmt: skip
    assert asked.messages == [{"role": "system", "content": "be short"}, {"role": "user", "content": "ab"}]
    assert asked.sampling == {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert (asked.max_tokens, asked.seed, asked.stop, asked.include_usage) == (7, 3, ("x",), True)
    assert asked.cache == CacheConfig(budget="12.5%", window=32)


def test_temperature_zero_is_greedy():
    assert read(temperature=0, top_p=0.5).sampling == {"do_sample": False}


def test_what_changes_nothing_is_taken():
    neutral = dict(n=1, logprobs=False, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, tools=[])
    neutral |= dict(tool_choice="none", response_format={"type": "text"}, user="me", store=False, metadata={"a": "b"})
    assert read(**neutral, temperature=None, stop=None, nestling=None) == read()


@pytest.mark.parametrize(
    "given, param, said",
    [
        (dict(model="left out"), "model", "expected a string"),
        (dict(model=3), "model", "model=3"),
        (dict(messages="left out"), "messages", "at least one message"),
        (dict(messages=["hello"]), "messages[0]", "role of system"),
        (dict(messages=[{"role": "tool", "content": "x"}]), "messages[0]", "role of system"),
        (dict(messages=[{"role": "user"}]), "messages[0].content", "expected a string"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content", "type text"),
        (dict(max_tokens=1.5), "max_tokens", "whole number"),
        (dict(temperature="hot"), "temperature", "finite number"),
        (dict(temperature=3), "temperature", "at most 2"),
        (dict(top_p=0), "top_p", "above 0"),
        (dict(seed=-1), "seed", "at least 0"),
        (dict(stop=[""]), "stop", "none empty"),
        (dict(stop=list("abcde")), "stop", "at most 4"),
        (dict(stream="yes"), "stream", "True or False"),
        (dict(stream=True, stream_options={"other": 1}), "stream_options", "include_usage"),
        (dict(nestling={"bits": 4}), "nestling", "with a budget"),
        (dict(nestling=0.5), "nestling", "with a budget"),
        (dict(nestling={"budget": {"bits": []}}), "budget", "expected a share"),
        (dict(nestling={"budget": 300}), "budget", "300"),
        (dict(nestling={"budget": True}), "budget", "True"),
        (dict(n=2), "n", "expected 1 or nothing"),
        (dict(tools=[{"type": "function"}]), "tools", "not served"),
        (dict(logprobs=True), "logprobs", "not served"),
        (dict(response_format={"type": "json_object"}), "response_format", "not served"),
        (dict(best_of=2), "best_of", "leave it out"),
    ],
)
def test_what_is_not_served_is_refused_by_name(given, param, said):
    with pytest.raises(RequestError, match=said) as caught:
        read(**given)
    error = caught.value.to_dict()["error"]
    assert caught.value.status == 400 and error["param"] == param and error["type"] == "invalid_request_error"


def test_another_model_is_not_found():
    with pytest.raises(RequestError, match="expected 'm'") as caught:
        read(model="n")
    assert caught.value.status == 404 and caught.value.code == "model_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_a_body_is_a_json_object(body):
    with pytest.raises(RequestError, match="the body is"):
        read_request(body, "m", CACHE)
