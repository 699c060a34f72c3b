"""OpenAI's own client against a real server: answers, streams, errors, clients that leave, models that fail."""

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest

from nestling import kv
from nestling.kv.integration.attach import implementation

from .conftest import CACHE, metrics

openai = pytest.importorskip("openai")

TEXT = "tell me of the sea, the keeper and the lamp that was lit at night"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 40, "temperature": 0}


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def slow(chat, monkeypatch):
    """The model waits at every token until the event is set."""
    go, forward = threading.Event(), chat.model.forward

    def wait(*args, **kwargs):
        go.wait(0.1)
        return forward(*args, **kwargs)

    wait.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(chat.model, "forward", wait)
    return go


def test_an_answer_is_that_of_generate(chat, serve):
    before = implementation(chat.model)
    with serve() as client:
        assert implementation(chat.model) == "nestling" != before
        reply = client.chat.completions.create(**ASK)
        assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    assert implementation(chat.model) == before
    choice, prompt = reply.choices[0], len("u:;a:") + len(TEXT)
    assert choice.message.content == chat.answer(TEXT, 40) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and reply.usage.completion_tokens == 40
    assert reply.usage.prompt_tokens == prompt and reply.usage.total_tokens == prompt + 40
    told = reply.nestling
    assert told["budget"] == 0.4 and 0 < told["cache_bytes"] < told["full_cache_bytes"]
    assert told["full_cache_bytes"] == (prompt + 39) * chat.adapter.full_elements * 2


def test_a_stream_is_the_same_answer_in_pieces(chat, serve):
    with serve() as client:
        chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.answer(TEXT, 40)
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 30
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].usage.completion_tokens == 40 and chunks[-2].nestling["budget"] == 0.4


def test_a_request_has_its_own_budget(chat, serve):
    with serve() as client:
        replies = {
            budget: client.chat.completions.create(**ASK, extra_body={"nestling": {"budget": budget}})
            for budget in (0.8, "30%", None)
        }
    for budget, reply in replies.items():
        asked = kv.CacheConfig(**(CACHE.to_dict() | {"budget": budget or 0.4}))
        assert reply.choices[0].message.content == chat.answer(TEXT, 40, asked)
    assert [reply.nestling["budget"] for reply in replies.values()] == [0.8, 0.3, 0.4]
    sizes = [reply.nestling["cache_bytes"] for reply in replies.values()]
    assert sizes[0] > sizes[2] > sizes[1]


def test_a_limit_in_bytes_holds_whatever_a_request_asks_for(serve):
    with serve(kv.CacheConfig(budget="0.005MiB", sinks=2, window=4, context=256)) as client:
        reply = client.chat.completions.create(**ASK, extra_body={"nestling": {"budget": 0.9}})
        assert reply.nestling["budget"] < 0.9 and metrics(client)["nestling_cache_bytes_peak"] <= 0.005 * 2**20
        with pytest.raises(openai.BadRequestError, match="both limits in bytes"):
            client.chat.completions.create(**ASK, extra_body={"nestling": {"budget": "1GiB"}})
        long = {**ASK, "messages": [{"role": "user", "content": "a" * 400}]}
        with pytest.raises(openai.BadRequestError, match="at the smallest budget"):
            client.chat.completions.create(**long)
        with pytest.raises(openai.BadRequestError, match="at the smallest budget"):
            client.chat.completions.create(**long, stream=True)
        assert client.chat.completions.create(**ASK).usage.completion_tokens == 40


def test_a_stop_ends_an_answer_and_is_no_part_of_it(chat, serve):
    whole = chat.answer(TEXT, 40)
    stop = whole[20:23]
    with serve() as client:
        reply = client.chat.completions.create(**ASK, stop=[stop, "never said"])
        chunks = list(client.chat.completions.create(**ASK, stop=stop, stream=True))
    expected = whole[: whole.index(stop)]
    assert reply.choices[0].message.content == expected and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 40
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_sampling_follows_its_seed(serve):
    with serve() as client:
        words = {**ASK, "temperature": 1.5, "top_p": 0.9}
        said = [client.chat.completions.create(**words, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "expected 'tiny'"),
        ({"messages": []}, openai.BadRequestError, "at least one message"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, openai.BadRequestError, "context of 512"),
        ({"messages": [{"role": "user", "content": "a" * 480}]}, openai.BadRequestError, "or lower max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
         openai.BadRequestError, "a system message comes first"),
        ({"max_tokens": 65}, openai.BadRequestError, "gives at most 64"),
        ({"max_tokens": 0}, openai.BadRequestError, "at least 1"),
        ({"temperature": -1}, openai.BadRequestError, "temperature=-1"),
        ({"n": 2}, openai.BadRequestError, "n=2 is not served"),
        ({"extra_body": {"nestling": {"budget": 0.001}}}, openai.BadRequestError, "below the smallest possible"),
        ({"extra_body": {"nestling": {"budget": "much"}}}, openai.BadRequestError, "much"),
        ({"extra_body": {"best_of": 3}}, openai.BadRequestError, "'best_of' is not served"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_of_clients_are_said(serve, change, error, said, stream):
    with serve() as client:
        with pytest.raises(error, match=said) as caught:
            client.chat.completions.create(**{**ASK, **change}, stream=stream)
        assert caught.value.type == "invalid_request_error"
        assert metrics(client)['nestling_requests_total{outcome="refused"}'] == 1


def post(client, body: bytes, path: str = "/v1/chat/completions", method: str = "POST"):
    connection = http.client.HTTPConnection(urlsplit(str(client.base_url)).netloc, timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_what_is_no_request_is_refused_in_the_same_shape(serve):
    with serve() as client:
        refused = [
            post(client, b"{"), post(client, b"[1]"), post(client, b"\xff"), post(client, b"[" * 100_000),
            post(client, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'),
            post(client, b'{"model": "tiny", "\\ud800": 1}'),
        ]  # fmt: skip
        assert [status for status, _ in refused] == [400] * 6
        assert post(client, b"a" * (16 * 2**20 + 1))[0] == 413
        assert post(client, b"", "/v2/nothing")[0] == 404 and post(client, b"", method="GET")[0] == 405
        for _, body in refused:
            assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["message"]
        assert post(client, b"", "/health", "GET") == (200, {"status": "ok"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_ends_the_answer_and_not_the_server(chat, serve, monkeypatch, stream):
    forward, calls = chat.model.forward, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of luck, at /a/place")
        return forward(*args, **kwargs)

    fail.__signature__ = __import__("inspect").signature(forward)
    with serve() as client:
        with monkeypatch.context() as patch, pytest.raises(openai.APIError, match="generation failed") as caught:
            patch.setattr(chat.model, "forward", fail)
            reply = client.chat.completions.create(**ASK, stream=stream)
            for _ in reply:
                pass
        assert "/a/place" not in str(caught.value)
        assert client.chat.completions.create(**ASK).choices[0].message.content == chat.answer(TEXT, 40)
        counted = metrics(client)
    assert counted['nestling_requests_total{outcome="failed"}'] == 1 and counted["nestling_cache_bytes"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(serve, slow, stream):
    with serve() as client:
        if stream:
            with client.chat.completions.create(**ASK, stream=True) as chunks:
                next(iter(chunks))
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).chat.completions.create(**ASK)
        until(lambda: metrics(client)['nestling_requests_total{outcome="gone"}'] == 1)
        counted = metrics(client)
        assert counted["nestling_requests_running"] == 0 and counted['nestling_tokens_total{kind="generated"}'] < 30
        slow.set()
        assert client.chat.completions.create(**ASK).usage.completion_tokens == 40


def test_without_a_line_one_client_after_another_is_answered(serve):
    with serve(queue=0) as client:
        for _ in range(8):
            assert client.chat.completions.create(**{**ASK, "max_tokens": 2}).usage.completion_tokens == 2


def test_the_line_has_an_end_and_those_who_wait_may_leave_it(serve, slow):
    with serve(queue=1) as client:
        answers = []

        def ask():
            answers.append(client.chat.completions.create(**ASK).usage.completion_tokens)

        running = threading.Thread(target=ask)
        running.start()
        until(lambda: metrics(client)["nestling_requests_running"] == 1)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**ASK)
        until(lambda: metrics(client)["nestling_requests_waiting"] == 0)
        waiting = threading.Thread(target=ask)
        waiting.start()
        until(lambda: metrics(client)["nestling_requests_waiting"] == 1)
        with pytest.raises(openai.RateLimitError, match="try again") as caught:
            client.chat.completions.create(**ASK)
        assert caught.value.response.headers["Retry-After"] == "1"
        slow.set()
        running.join(60), waiting.join(60)
        assert answers == [40, 40]
        counted = metrics(client)
    outcomes = {name.split('"')[1]: n for name, n in counted.items() if name.startswith("nestling_requests_total")}
    assert outcomes == {"answered": 2, "refused": 0, "busy": 1, "gone": 1, "failed": 0}


def test_a_server_that_stops_leaves_nobody_waiting(chat, serve, slow, monkeypatch):
    monkeypatch.setattr("nestling.integrations.serve.server.GRACE", 1)
    ended = []

    def ask(client):
        try:
            client.chat.completions.create(**ASK)
            ended.append("answered")
        except openai.APIError as error:
            ended.append(type(error).__name__)

    with serve() as client:
        threads = [threading.Thread(target=ask, args=[client]) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: metrics(client)["nestling_requests_waiting"] == 2)
        started = time.monotonic()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - started < 15 and len(ended) == 3 and "answered" not in ended
