"""Vectors of a corpus in files: those of `encode_document`, whole after every kill, and what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from nestling.embed import ElasticEncoder, EncodeConfig, EncodeError, Vectors, encode_corpus
from nestling.embed.corpus import engines, shards
from nestling.errors import DataError, FileError, LadderError, OptionError

from ..families import WORDS, sentence_model

SIZES = "1x8,2x16,4x32"
ROWS = [
    {"id": f"d{number}", "text": " ".join(WORDS[number % 7 : number % 7 + 1 + number % 5])} for number in range(47)
]
PARTS = EncodeConfig(shard_rows=10, batch_size=4)


@pytest.fixture(scope="module")
def model(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "model"
    sentence_model(backbones("bert")).save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def watched(monkeypatch) -> list[int]:
    """The numbers of shards that are written from now on."""
    numbers = []

    def write(folder, work, *more, real=shards.write_shard):
        numbers.append(work.number)
        return real(folder, work, *more)

    monkeypatch.setattr(engines, "write_shard", write)
    return numbers


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_vectors_are_those_of_the_documents(model, corpus, tmp_path, format, dtype):
    config = EncodeConfig(shard_rows=10, batch_size=4, format=format, dtype=dtype)
    found = encode_corpus(str(model), corpus, tmp_path / "vectors", config, sizes=SIZES)
    assert found.rows == 47 and found.shards == 5 and found.ids == [row["id"] for row in ROWS]
    assert found.sizes == ("1x8", "2x16", "4x32") and len(set(found.spaces.values())) == 3
    encoder = ElasticEncoder.from_pretrained(str(model), SIZES)
    for size in found.sizes:
        expected, stored = encoder.encode_document([row["text"] for row in ROWS], size), next(found.parts(size))[1]
        assert stored.dtype == np.dtype(dtype) and stored.shape == (10, expected.shape[1])
        assert np.abs(found.read(size) - expected).max() < (0.001 if dtype == "float16" else 0.01)
    assert Vectors.open(tmp_path / "vectors") == found


def test_several_sizes_cost_one_forward(model, corpus, tmp_path, monkeypatch):
    import nestling.embed.model.encode as room

    forwards = []
    monkeypatch.setattr(room, "pooled_taps", lambda *a, real=room.pooled_taps: forwards.append(1) or real(*a))
    encode_corpus(str(model), corpus, tmp_path / "vectors", EncodeConfig(shard_rows=47, batch_size=47), sizes=SIZES)
    assert len(forwards) == 1


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_run_that_stopped_goes_on_to_the_same_bytes(model, corpus, tmp_path, monkeypatch, format):
    config = EncodeConfig(shard_rows=10, batch_size=4, format=format)
    encode_corpus(str(model), corpus, tmp_path / "whole", config, sizes=SIZES)
    numbers = []

    def stopping(folder, work, *more, real=shards.write_shard):
        if len(numbers) == 3:
            raise KeyboardInterrupt
        numbers.append(work.number)
        return real(folder, work, *more)

    monkeypatch.setattr(engines, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(str(model), corpus, tmp_path / "stopped", config, sizes=SIZES)
    with pytest.raises(EncodeError, match="not all vectors are there yet"):
        Vectors.open(tmp_path / "stopped")
    stem = "part-00001.parquet" if format == "parquet" else "part-00001.2x16.npy"
    damaged = (tmp_path / "stopped" / stem).read_bytes()
    (tmp_path / "stopped" / stem).write_bytes(damaged[:-1])
    written = watched(monkeypatch)
    encode_corpus(str(model), corpus, tmp_path / "stopped", config, sizes=SIZES)
    assert numbers == [0, 1, 2] and written == [1, 3, 4]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_texts_that_have_changed_are_encoded_again_and_shards_behind_the_end_removed(model, tmp_path, monkeypatch):
    encode_corpus(str(model), ROWS, tmp_path / "vectors", PARTS, sizes="4x32")
    written = watched(monkeypatch)
    rows = [*ROWS[:12], {"id": "new", "text": "w9"}, *ROWS[13:25]]
    found = encode_corpus(str(model), iter(rows), tmp_path / "vectors", PARTS, sizes="4x32")
    assert written == [1, 2] and found.rows == 25 and found.ids[12] == "new"
    assert not list((tmp_path / "vectors").glob("part-00003*"))


@pytest.mark.slow
def test_processes_write_the_same_vectors_and_survive_a_kill(model, tmp_path):
    job = engines.Job(str(model), "auto", ("1x8", "4x32"), tmp_path, "npy", "float16", 4, "job")
    works = [shards.Work(n, (f"d{n}",), (WORDS[n],)) for n in range(12)]
    before, done = set(psutil.Process().children(recursive=True)), []
    for shard in engines.in_processes(job, iter(works), 2):
        if not done:
            workers = [
                p for p in psutil.Process().children() if p not in before and "spawn_main" in " ".join(p.cmdline())
            ]
            workers[0].send_signal(signal.SIGKILL)
        done.append(shard.number)
    assert sorted(set(done)) == list(range(12))
    expected = ElasticEncoder.from_pretrained(str(model), SIZES).encode_document([WORDS[n] for n in range(12)])
    found = np.concatenate([shards.read_shard(tmp_path, n, "npy", ("4x32",))[1]["4x32"] for n in range(12)])
    assert np.abs(found - expected).max() < 0.001


@pytest.mark.slow
def test_workers_that_are_always_lost_end_the_run(model, tmp_path, monkeypatch):
    job = engines.Job(1, "auto", ("4x32",), tmp_path, "npy", "float16", 4, "job")
    monkeypatch.setattr(engines, "_start", _end)
    with pytest.raises(EncodeError, match="lost 3 times in a row"):
        list(engines.in_processes(job, iter([shards.Work(0, ("a",), ("b",))]), 1))


def _end(job):
    os._exit(1)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(model, corpus, tmp_path):
    code = (
        "import sys, time\n"
        "from nestling.embed import EncodeConfig, encode_corpus\n"
        "from nestling.embed.corpus import engines\n"
        "real = engines.write_shard\n"
        "def slow(*a):\n    shard = real(*a)\n    time.sleep(float(sys.argv[4]))\n    return shard\n"
        "engines.write_shard = slow\n"
        "encode_corpus(sys.argv[1], sys.argv[2], sys.argv[3], "
        "EncodeConfig(shard_rows=5, batch_size=4), sizes='2x16,4x32')\n"
    )

    def start(out, pause):
        return subprocess.Popen([sys.executable, "-c", code, str(model), str(corpus), str(tmp_path / out), str(pause)])

    assert start("whole", 0).wait() == 0
    killed = start("killed", 1)
    while len(list((tmp_path / "killed").glob("*.parquet"))) < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert start("killed", 0).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_cannot_be_is_refused(model, corpus, tmp_path):
    out = tmp_path / "vectors"
    encode_corpus(str(model), corpus, out, PARTS, sizes="2x16,4x32")
    with pytest.raises(EncodeError, match=r"another job \(sizes, spaces differ\)"):
        encode_corpus(str(model), corpus, out, PARTS, sizes="4x32")
    with pytest.raises(LadderError, match="no vectors of 1x8"):
        Vectors.open(out).read("1x8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="holds no vectors of nestling"):
        encode_corpus(str(model), corpus, tmp_path / "mine", PARTS)
    with pytest.raises(EncodeError, match="holds no vectors"):
        Vectors.open(tmp_path / "mine")
    with pytest.raises(DataError, match="'d0' is there twice"):
        encode_corpus(str(model), [ROWS[0], ROWS[0]], tmp_path / "new", PARTS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OptionError, match="load it by its name"):
        encode_corpus(ElasticEncoder.from_pretrained(str(model)), corpus, out, EncodeConfig(engine="processes"))
    with pytest.raises(OptionError, match="engine='cloud' is unknown"):
        EncodeConfig(engine="cloud")
    (out / "part-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(EncodeError, match=r"part-00002.parquet is damaged"):
        Vectors.open(out).read("4x32")


def test_lengths_that_count_are_not_stored_in_int8(backbones, tmp_path):
    encoder = ElasticEncoder.from_pretrained(sentence_model(backbones("bert")))
    encoder.model.similarity_fn_name = "dot"
    with pytest.raises(OptionError, match="int8"):
        encode_corpus(encoder, ROWS, tmp_path / "vectors", EncodeConfig(dtype="int8"))
