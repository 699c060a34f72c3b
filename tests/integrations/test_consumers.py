"""Libraries that read an exported size: the snippets of its card, run as they are, give its vectors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nestling.embed import ElasticEncoder

from ..embed.families import save_backbone, sentence_model

SCRIPT = Path(__file__).with_name("consumers.cjs")
LIBRARIES = (
    "sentence_transformers",
    "langchain_huggingface",
    "llama_index.embeddings.huggingface",
    "haystack_integrations.components.embedders.sentence_transformers",
    "onnxruntime",
    "fastembed",
)
TEXTS = ["a sentence", "The lighthouse keeper wrote down the weather every evening.", "Water."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A size of a tiny encoder; WordPiece, since that is what every library can read."""
    pytest.importorskip("onnxscript")
    place = tmp_path_factory.mktemp("consumers")
    model = sentence_model(save_backbone("bert", place / "bert", "right"))
    ElasticEncoder(model).export("2x8", place / "cup", onnx=True)
    return place / "cup"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm") / "cup"
    ElasticEncoder.from_pretrained("minilm").export("2x64", folder, onnx=True, int8=True)
    return folder


def snippet(folder: Path, library: str) -> str:
    """The card's Python that imports a library, with the folder's own path in it."""
    blocks = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    [code] = [block for block in blocks if re.search(rf"^(from|import) {re.escape(library)}\b", block, re.MULTILINE)]
    return code.replace("this folder", str(folder))


def apart(found, folder: Path, texts: list[str]) -> float:
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert np.shape(found) == expected.shape
    return float(np.abs(np.asarray(found) - expected).max())


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_cards_snippets_give_the_sizes_vectors(tiny, library):
    pytest.importorskip(library)
    names: dict = {}
    exec(compile(snippet(tiny, library), library, "exec"), names)
    assert apart(names["vectors"], tiny, ["a sentence"]) <= 1e-5


def test_ids_and_mask_are_all_that_the_graph_asks_for_and_the_tokenizer_makes(tiny):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tiny / "onnx" / "model.onnx")
    names: dict = {}
    exec(snippet(tiny, "onnxruntime"), names)
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask"] == list(names["tokens"])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES[1:])
def test_minilm_by_every_library(minilm, library):
    pytest.importorskip(library)
    names: dict = {}
    exec(snippet(minilm, library), names)
    assert apart(names["vectors"], minilm, ["a sentence"]) <= 1e-5


@pytest.mark.real
@pytest.mark.slow
def test_transformers_js(minilm):
    """The pipeline, whichever way it pools, and AutoModel, in fp32 and q8."""
    packages = Path(sys.prefix)
    if not shutil.which("node") or not (packages / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs node, and @huggingface/transformers beside the environment")
    done = subprocess.run(["node", SCRIPT, packages, minilm, *TEXTS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {name: np.asarray(vectors) for name, vectors in json.loads(done.stdout).items()}
    assert len(found) == 6
    expected = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)
    for name, vectors in found.items():
        if "fp32" in name:
            assert np.abs(vectors - expected).max() <= 1e-5, name
        else:
            cosines = (vectors * expected).sum(-1) / np.linalg.norm(vectors, axis=-1)
            assert cosines.min() > 0.98, name
