"""An exported cup as an ONNX graph: token ids and mask to embeddings, by torch's own exporter.

The graph has everything in it, pooling, Dense and normalisation, since runtimes such as fastembed cut nothing. Its
first output is the embedding. The second, ``token_embeddings``, has it once for every token: transformers.js, whose
pipeline reads token vectors and pools them itself, then gets the embedding whichever way it pools. It is not called
``last_hidden_state``, as sentence-transformers' ONNX backend expects it: that would put the folder's own pooling and
Dense on top, once more.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from nestling.embed.export.compatibility import inputs
from nestling.embed.export.probe import SENTENCES, apart, probe_texts
from nestling.errors import ExportError

TOLERANCE = 1e-4  # of coordinates of unit vectors
CLOSE = 0.9  # the mean cosine of int8 vectors to those in fp32, at least
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIMIT = 2**31 - 2**24  # bytes of weights: a file of protocol buffers holds 2 GiB
OUTPUTS = ("sentence_embedding", "token_embeddings")


def check_installed() -> None:
    """Raises ExportError unless the packages that it takes are there."""
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise ExportError(f"ONNX needs {' and '.join(missing)}: pip install 'nestling[onnx]'")


def check_prompts(model: SentenceTransformer) -> None:
    """Raises ExportError if a graph of ids and mask cannot do what the model does with its prompts."""
    masked = any(isinstance(module, Pooling) and not module.include_prompt for module in model)
    prompts = [prompt for prompt in model.prompts.values() if prompt]
    if masked and prompts:
        raise ExportError(
            f"the model leaves prompts such as {prompts[0]!r} out of its pooling (include_prompt=False), and an ONNX "
            "graph of token ids cannot know which are a prompt's: export without onnx"
        )


def write(model: SentenceTransformer, folder: Path, int8: bool) -> tuple[float, float | None]:
    """Write ``model.onnx``, and ``model_int8.onnx`` if asked, and compare them with the model on ragged batches.

    The int8 graph is also called ``model_quantized.onnx``, as transformers.js calls its "q8".

    Dynamic quantisation: weights of products and embeddings to 8 bits with a scale per channel, activations by their
    range as they come. Unsigned, since signed products overflow on CPUs without VNNI.

    Args:
        model: on the CPU.
        folder: made if it is not there.

    Returns:
        The largest difference of a coordinate in fp32, and the mean cosine of int8 to fp32, if it was made.

    Raises:
        ExportError: the model is too large for one file, cannot be traced, or a graph gives other vectors.
    """
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes > LIMIT:
        raise ExportError(f"the weights take {nbytes / 2**30:.1f} GiB, an ONNX file holds 2: export a smaller cup")
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    model.eval()
    try:
        _trace(model, path)
    except OSError:  # the disk is full, for one
        raise
    except Exception as error:  # whatever an operator is missing
        first = (str(error).splitlines() or [""])[0]
        raise ExportError(f"the model cannot be written as ONNX [{type(error).__name__}: {first}]") from error
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


def _trace(model: SentenceTransformer, path: Path) -> None:
    import onnx

    features, names = model.preprocess(list(SENTENCES)), inputs(model)
    tensors = tuple(features[name] for name in names)
    with torch.no_grad(), warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # about names of axes and the exporter's own deprecations
        torch.onnx.export(
            _Graph(model, names).eval(),
            tensors,
            str(path),
            input_names=names,
            output_names=list(OUTPUTS),
            dynamic_shapes=(({0: "batch", 1: "tokens"},) * len(names),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    # The exporter notes for every node where in which file it comes from, paths of this machine included.
    made = onnx.load(str(path))
    for node in [*made.graph.node, *(node for function in made.functions for node in function.node)]:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.save(made, str(path))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes on what it could do if other packages were there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _vectors(model: SentenceTransformer, path: Path) -> tuple[Tensor, Tensor]:
    """Embeddings by the model and by the graph, of one text alone, of two, and of all the others in one batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    texts = probe_texts(model)
    wanted, found = [], []
    for batch in (texts[:1], texts[1:3], texts[3:]):
        features: dict[str, Any] = model.preprocess(batch)
        feed = {name: features[name].numpy() for name in names}
        found.append(torch.from_numpy(session.run([OUTPUTS[0]], feed)[0]))
        with torch.no_grad():
            wanted.append(model(features)["sentence_embedding"])
    return torch.cat(wanted), torch.cat(found)


def _quantised(model: SentenceTransformer, source: Path, path: Path) -> float:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QUInt8, per_channel=True)
    wanted, found = _vectors(model, path)
    cosine = float(cosine_similarity(wanted, found, dim=-1).mean())
    if not cosine >= CLOSE:
        raise ExportError(
            f"with int8 weights the mean cosine to the model's vectors is {cosine:.2f}, expected at least {CLOSE}: "
            "export without int8"
        )
    return cosine
