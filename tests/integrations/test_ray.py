"""Ray Data as the engine of `encode_corpus`: two local nodes, and a worker that is killed."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from nestling.embed import EncodeConfig, Vectors, encode_corpus

from ..embed.families import WORDS, save_backbone, sentence_model

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    sentence_model(save_backbone("bert", folder / "backbone")).save_pretrained(str(folder / "model"))
    rows = [{"id": f"d{number}", "text": " ".join(WORDS[number % 50 : number % 50 + 8])} for number in range(120)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes on this machine, of two processors each."""
    from ray.cluster_utils import Cluster

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or workers wait for whatever else the machine does
    environment = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=environment)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    monkeypatch.undo()


def test_two_nodes_write_the_same_vectors_and_a_killed_worker_loses_nothing(place, nodes):
    from nestling.integrations.ray import ray_engine

    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    config = EncodeConfig(shard_rows=5, batch_size=4, format="npy")
    corpus, model = place / "corpus.jsonl", str(place / "model")
    whole = encode_corpus(model, corpus, place / "whole", config, sizes="2x16,4x32")
    killed = []

    def engine(job, works, workers):
        for shard in ray_engine(job, works, workers):
            if not killed and (actors := _actors()):
                killed.append(actors[0].pid)
                actors[0].send_signal(signal.SIGKILL)
            yield shard

    config = EncodeConfig(shard_rows=5, batch_size=4, format="npy", engine=engine, workers=3)
    found = encode_corpus(model, corpus, place / "nodes", config, sizes="2x16,4x32")
    assert killed and found.ids == whole.ids
    for size in ("2x16", "4x32"):
        assert abs(found.read(size) - whole.read(size)).max() < 0.001
    assert Vectors.open(place / "nodes").rows == 120


def _actors() -> list[psutil.Process]:
    """Processes of Ray that write shards."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ray::" in line and ("ShardWriter" in line or "MapWorker" in line):
            found.append(process)
    return found
