"""Many clients at once: nobody is lost, everyone gets an own answer, and memory does not grow."""

import gc
import threading
import time
from queue import Empty, Queue

import psutil
import pytest

from .conftest import metrics

openai = pytest.importorskip("openai")

REQUESTS, CLIENTS, TOKENS = 200, 8, 24


def question(number: int) -> str:
    return f"tell me of the sea and of ship {number} " + "and of the lamp " * (number % 7)


@pytest.mark.slow
@pytest.mark.parametrize("leaving", [False, True])
def test_200_requests_8_at_a_time(chat, serve, leaving):
    """With ``leaving`` a quarter of the clients go away in the middle of a stream."""
    process, numbers, answers, resident = psutil.Process(), Queue(), {}, []
    for number in range(REQUESTS):
        numbers.put(number)

    def ask(client) -> None:
        while True:
            try:
                number = numbers.get_nowait()
            except Empty:
                return
            words = {"messages": [{"role": "user", "content": question(number)}], "max_tokens": TOKENS}
            words |= {"model": "tiny", "temperature": 0}
            if number % 2:
                answers[number] = client.chat.completions.create(**words).choices[0].message.content
            else:
                with client.chat.completions.create(**words, stream=True) as chunks:
                    told = []
                    for chunk in chunks:
                        told.append(chunk.choices[0].delta.content or "")
                        if leaving and number % 4 == 0 and len(told) > 4:
                            break
                answers[number] = "".join(told)
            resident.append(process.memory_info().rss)

    with serve() as client:
        threads = [threading.Thread(target=ask, args=[client]) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        while metrics(client)["nestling_requests_running"]:
            time.sleep(0.05)
        counted = metrics(client)
    assert sorted(answers) == list(range(REQUESTS))
    for number in range(0, REQUESTS, 9):
        expected = chat.answer(question(number), TOKENS)
        left = leaving and number % 4 == 0
        assert answers[number] == expected or (left and expected.startswith(answers[number]))
    outcomes = {name.split('"')[1]: n for name, n in counted.items() if name.startswith("nestling_requests_total")}
    assert outcomes["refused"] == outcomes["busy"] == outcomes["failed"] == 0
    assert outcomes["answered"] + outcomes["gone"] == REQUESTS and (leaving or not outcomes["gone"])
    longest = chat.tokenizer.apply_chat_template([{"role": "user", "content": question(6 + 7 * 27)}], tokenize=False)
    most = (len(longest) + 2 + TOKENS) * chat.adapter.full_elements * 2
    # What one cache may take, and not eight.
    assert 0 < counted["nestling_cache_bytes_peak"] < counted["nestling_cache_full_bytes_peak"] <= most
    assert counted["nestling_cache_bytes"] == 0
    gc.collect()
    grown = (sum(resident[-20:]) - sum(resident[40:60])) / 20
    assert grown < 4 * 2**20
