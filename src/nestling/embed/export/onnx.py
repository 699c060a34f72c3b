"""An exported size as an ONNX graph: token ids and mask to embeddings, by torch's own exporter.

The graph has everything in it, pooling, Dense and normalisation, since runtimes such as fastembed cut nothing. Its
first output is the embedding. The second, ``token_embeddings``, has it once for every token: transformers.js, whose
pipeline reads token vectors and pools them itself, then gets the embedding whichever way it pools. It is not called
``last_hidden_state``, as sentence-transformers' ONNX backend expects it: that would put the folder's own pooling and
Dense on top, once more.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from nestling.embed.export.compatibility import inputs
from nestling.embed.export.probe import SENTENCES, apart, probe_texts
from nestling.embed.export.tracing import quantise, session, trace
from nestling.errors import ExportError

TOLERANCE = 1e-4  # of coordinates of unit vectors
CLOSE = 0.9  # the mean cosine of int8 vectors to those in fp32, at least
OUTPUTS = ("sentence_embedding", "token_embeddings")


def check_prompts(model: SentenceTransformer, prompts: Iterable[str | None]) -> None:
    """Raises ExportError if a graph of ids and mask cannot do what the model does with some prompts."""
    masked = any(isinstance(module, Pooling) and not module.include_prompt for module in model)
    if masked and (said := [prompt for prompt in prompts if prompt]):
        raise ExportError(
            f"the model leaves prompts such as {said[0]!r} out of its pooling (include_prompt=False), and an ONNX "
            "graph of token ids cannot know which are a prompt's: leave ONNX out"
        )


def write(model: SentenceTransformer, folder: Path, int8: bool) -> tuple[float, float | None]:
    """Write ``model.onnx``, and ``model_int8.onnx`` if asked, and compare them with the model on ragged batches.

    The int8 graph is also called ``model_quantized.onnx``, as transformers.js calls its "q8".

    Args:
        model: on the CPU.
        folder: made if it is not there.

    Returns:
        The largest difference of a coordinate in fp32, and the mean cosine of int8 to fp32, if it was made.

    Raises:
        ExportError: the model is too large for one file, cannot be traced, or a graph gives other vectors.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    model.eval()
    features, names = model.preprocess(list(SENTENCES)), inputs(model)
    trace(_Graph(model, names).eval(), {name: features[name] for name in names}, OUTPUTS, path)
    difference = apart(*reversed(_vectors(model, path)))
    if not difference <= TOLERANCE:
        raise ExportError(f"the ONNX graph's vectors differ by {difference:.1e}, above {TOLERANCE:.0e}")
    if not int8:
        return difference, None
    cosine = _quantised(model, path, folder / "model_int8.onnx")
    try:
        os.link(folder / "model_int8.onnx", folder / "model_quantized.onnx")
    except OSError:  # no hard links there
        shutil.copyfile(folder / "model_int8.onnx", folder / "model_quantized.onnx")
    return difference, cosine


class _Graph(nn.Module):
    """The whole model as a function of tensors."""

    def __init__(self, model: SentenceTransformer, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.model(dict(zip(self.names, tensors, strict=True)))["sentence_embedding"]
        return vectors, vectors[:, None].expand(-1, tensors[0].shape[1], -1)


def _vectors(model: SentenceTransformer, path: Path) -> tuple[Tensor, Tensor]:
    """Embeddings by the model and by the graph, of one text alone, of two, and of all the others in one batch."""
    graph = session(path)
    names = [entry.name for entry in graph.get_inputs()]
    texts = probe_texts(model)
    wanted, found = [], []
    for batch in (texts[:1], texts[1:3], texts[3:]):
        features: dict[str, Any] = model.preprocess(batch)
        feed = {name: features[name].numpy() for name in names}
        found.append(torch.from_numpy(graph.run([OUTPUTS[0]], feed)[0]))
        with torch.no_grad():
            wanted.append(model(features)["sentence_embedding"])
    return torch.cat(wanted), torch.cat(found)


def _quantised(model: SentenceTransformer, source: Path, path: Path) -> float:
    quantise(source, path)
    wanted, found = _vectors(model, path)
    cosine = float(cosine_similarity(wanted, found, dim=-1).mean())
    if not cosine >= CLOSE:
        raise ExportError(
            f"with int8 weights the mean cosine to the model's vectors is {cosine:.2f}, expected at least {CLOSE}: "
            "export without int8"
        )
    return cosine
