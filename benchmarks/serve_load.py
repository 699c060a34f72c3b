"""`nestling kv serve` under load: many requests of several clients at once, and what the server's process holds.

    python benchmarks/serve_load.py [--model smollm2] [--budget 25%] [--requests 200] [--clients 8]

The server is a process of its own, so its resident memory is its own too. Each request asks a question about another
part of the built-in pages; every second answer is streamed. Rows are quarters of the run, by the order of answers.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from queue import Empty, Queue

import openai
import psutil
import typer
from rich.console import Console

from nestling.data.texts import read_texts
from nestling.jobs.progress import progress_bar
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

COMMAND = "from nestling.cli import app; app()"


def metrics(url: str) -> dict[str, float]:
    """What the server counts."""
    with urllib.request.urlopen(url.replace("/v1", "/metrics")) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def ask(client: openai.OpenAI, model: str, number: int, page: str, tokens: int) -> tuple[float, int]:
    """Seconds of one answer, and the bytes of its cache."""
    words = {"model": model, "temperature": 0, "max_tokens": tokens}
    words["messages"] = [{"role": "user", "content": f"{page}\n\nQuestion {number}: what is this about?"}]
    start = time.monotonic()
    if number % 2:
        last = client.chat.completions.create(**words)
    else:
        *_, last = client.chat.completions.create(**words, stream=True)
    return time.monotonic() - start, last.nestling["cache_bytes"]


def main(
    model: str = typer.Option("smollm2"),
    budget: str = typer.Option("25%"),
    requests: int = typer.Option(200),
    clients: int = typer.Option(8),
    tokens: int = typer.Option(8, help="Of an answer."),
    characters: int = typer.Option(400, help="Of the text that is asked about."),
    out: Path = typer.Option(Path("benchmarks/results/serve_load.json")),
):
    start = time.monotonic()
    words = ["kv", "serve", model, "--budget", budget, "--port", "0"]
    server = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        threading.Thread(target=server.stdout.read, daemon=True).start()  # its log, which must not fill the pipe
        while True:
            try:
                metrics(url)
                break
            except OSError:
                time.sleep(0.1)
        text, process = "\n".join(read_texts(None)), psutil.Process(server.pid)
        numbers: Queue[int] = Queue()
        for number in range(requests):
            numbers.put(number)
        answers: list[tuple[float, int, int]] = []

        def work(client: openai.OpenAI, advance) -> None:
            while True:
                try:
                    number = numbers.get_nowait()
                except Empty:
                    return
                page = text[number * characters : (number + 1) * characters]
                answers.append((*ask(client, model, number, page, tokens), process.memory_info().rss))
                advance()

        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client, progress_bar() as bar:
            task = bar.add_task("requests", total=requests)
            threads = [threading.Thread(target=work, args=[client, lambda: bar.advance(task)]) for _ in range(clients)]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - began
        counted = metrics(url)
    finally:
        server.terminate()
        server.wait()
    quarter = requests // 4
    rows = []
    for first in range(0, quarter * 4, quarter):
        part = answers[first : first + quarter]
        rows.append(
            {
                "requests": f"{first + 1} to {first + quarter}",
                "seconds": statistics.median(s for s, _, _ in part),
                "resident_mib": statistics.median(r for _, _, r in part) / 2**20,
            }
        )
    summary = {
        "model": model,
        "budget": budget,
        "requests": requests,
        "clients": clients,
        "answered": int(counted['nestling_requests_total{outcome="answered"}']),
        "requests_per_second": requests / seconds,
        "prompt_tokens": int(counted['nestling_tokens_total{kind="prompt"}']),
        "largest_cache_mib": max(b for _, b, _ in answers) / 2**20,
        "held_peak_mib": counted["nestling_cache_bytes_peak"] / 2**20,
        "full_peak_mib": counted["nestling_cache_full_bytes_peak"] / 2**20,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, {**run_meta(time.monotonic() - start), **summary})
    console = Console()
    console.print(table(rows, title=f"{model} at {budget}, {clients} clients at once"))
    console.print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    typer.run(main)
