"""`nestling kv serve`: it says where it listens, answers, ends when it is told to, and refuses what cannot be."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nestling.cli import app

from .conftest import metrics

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def place(chat, tmp_path_factory):
    """A folder with the model and its adapter."""
    folder = tmp_path_factory.mktemp("serve")
    chat.model.save_pretrained(folder / "lm")
    chat.tokenizer.save_pretrained(folder / "lm")
    chat.adapter.save_pretrained(folder / "adapter")
    return folder


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["kv", "serve", *map(str, arguments)])
    assert result.exit_code == 1
    return " ".join(result.output.split())


def test_the_command_serves_until_it_is_told_to_stop(place):
    # As in a terminal: what runs in the background of a shell is started with interrupts ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from nestling.cli import app; app()"
    words = ["kv", "serve", "lm", "adapter", "--port", "0", "--budget", "40%", "--window", "4", "--sinks", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        url = re.search(r"lm at (\S+)", process.stdout.readline())[1]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=5) as client:
            ask = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            reply = client.chat.completions.create(**ask)
            assert reply.usage.completion_tokens <= 5 and reply.nestling["budget"] == 0.4
            assert metrics(client)['nestling_requests_total{outcome="answered"}'] == 1
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130 and said.strip().endswith("stopped") and "Traceback" not in said
    finally:
        process.kill()


def test_what_cannot_be_served_is_said_at_once(place, monkeypatch):
    assert "the package has no adapter for it" in refused(place / "lm")
    assert "below the smallest possible" in refused(place / "lm", place / "adapter", "--port", 0, "--budget", "0.1%")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("no-such-model", "none", "--port", port)
    assert f"port={port}: cannot listen there" in said and "choose another port" in said
    assert "cannot listen there" in refused("smollm2", "--host", "no.such.host.invalid")
    assert "port=65536 is out of range" in refused("smollm2", "--port", 65536)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'nestling[serve]'" in refused("smollm2", "--port", 0)


def test_a_model_without_a_chat_template_is_refused(place, chat, tmp_path):
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).unlink(missing_ok=True)
    assert "no chat template" in refused(tmp_path, place / "adapter", "--port", 0, "--budget", 0.5)
