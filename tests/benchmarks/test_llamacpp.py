"""llama.cpp beside nestling: the file that both read, and what is measured of caches."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from nestling.jobs.results import ResultStore

from ..kv.families import tiny_fit, tiny_model

pytest.importorskip("gguf")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
gguf_file = importlib.import_module("gguf_file")
sys.path.pop(0)

LLAMAS = {"llama-gqa": {"head_dim": 64}, "llama-mha": {"head_dim": 32, "tie_word_embeddings": True}}


def ids_of(length: int, windows: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (windows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llamacpp(monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("llamacpp"), importlib.import_module("kv_llamacpp")


@pytest.mark.parametrize("family", LLAMAS)
def test_transformers_reads_the_same_weights(tmp_path, family):
    model = tiny_model(family, **LLAMAS[family])
    gguf_file.write_gguf(model, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = ids_of(40)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="qwen2 with a rope of type default: expected a llama"):
        gguf_file.write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf")
    with pytest.raises(typer.BadParameter, match="no biases"):
        gguf_file.write_gguf(tiny_model("llama-gqa", mlp_bias=True), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", LLAMAS)
def test_both_engines_agree(tmp_path, family, llamacpp):
    """Full caches give the same logits whatever the chunk; fewer bits cost more and are fewer bytes."""
    llama, bench = llamacpp
    lm, ids = tiny_model(family, **LLAMAS[family]), ids_of(256, 2)
    gguf_file.write_gguf(lm, tmp_path / "model.gguf")
    model, store = llama.Model(tmp_path / "model.gguf"), ResultStore()
    rows, apart = bench.losses(model, lm, ids, 100, store)
    plain, f16, q8, q4 = [row["kl"] for row in rows]
    assert apart < 1e-3 and 0 < max(plain, f16) < q8 < q4 < 1
    elements = 2 * lm.config.num_hidden_layers * lm.config.num_key_value_heads * lm.config.head_dim
    assert [row["bytes_per_token"] / elements for row in rows] == pytest.approx([2, 2, 34 / 32, 18 / 32], abs=0.06)
    assert bench.losses(None, lm, ids, 100, store) == (rows, apart)
    lm.model.norm.weight.data *= 1.1
    with pytest.raises(RuntimeError, match="logits of llama.cpp differ by .* from transformers': 0.01 is allowed"):
        bench.window_losses(model, lm, ids[0], 100)
    model.close()


def test_speeds_are_beside_the_own_full_cache(tmp_path, llamacpp):
    llama, bench = llamacpp
    lm = tiny_model("llama-gqa", head_dim=64)
    gguf_file.write_gguf(lm, tmp_path / "model.gguf")
    model, adapter = llama.Model(tmp_path / "model.gguf"), tiny_fit(lm, ids_of(64, 8))
    measured = bench.speeds(lm, adapter, [0.5], model, 512, 2)
    rows = [{"engine": bench.engine(method), "method": method, "budget": budget} for method, budget in measured]
    bench.add_speeds(rows, measured, 512)
    assert {row["engine"] for row in rows} == {"llama.cpp", "transformers"} and len(rows) == 8
    for name in ("llama.cpp", "transformers"):
        own = [row for row in rows if row["engine"] == name]
        assert max(row["over_full_512"] for row in own if row["method"] in bench.FULL) == 1
        assert all(row["tokens_per_s_512"] > 0 and row["mib_512"] > 0 for row in own)
    model.close()


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
def test_copies_fill_a_cache(tmp_path, llamacpp, kind):
    """It holds as many bytes as one that has read as many tokens, and is full at the same one."""
    llama, _ = llamacpp
    gguf_file.write_gguf(tiny_model("llama-gqa", head_dim=64), tmp_path / "model.gguf")
    model = llama.Model(tmp_path / "model.gguf")
    read, copied = (llama.Context(model, kind, 256, 64, copies) for copies in (1, 5))
    for part in ids_of(250)[0].split(50):
        assert read.read(part.tolist()).shape == (50, 97)
    copied.fill(250)
    assert copied.held() == read.held()
    for context in (read, copied):
        for _ in range(6):
            assert context.read([5]).isfinite().all()
        with pytest.raises(RuntimeError, match="failed with 1 at 1 tokens from position"):
            context.read([5])
        context.close()
    model.close()
