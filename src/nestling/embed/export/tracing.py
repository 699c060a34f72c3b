"""A module as an ONNX graph, by torch's own exporter: traced, with weights in 8 bits, opened to be run."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling.errors import ExportError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIMIT = 2**31 - 2**24  # bytes of weights: a file of protocol buffers holds 2 GiB


def check_installed() -> None:
    """Raises ExportError unless the packages that it takes are there."""
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise ExportError(f"ONNX needs {' and '.join(missing)}: pip install 'nestling[onnx]'")


def trace(module: nn.Module, tensors: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Write a module as a graph in which batch and length are free.

    Args:
        module: on the CPU, in eval mode; a function of the tensors in their order.
        tensors: an example, ``[B, T]`` each, by the names that the graph's inputs have.
        outputs: the names of what it returns.

    Raises:
        ExportError: the module is too large for one file, or cannot be traced.
    """
    nbytes = sum(p.numel() * p.element_size() for p in module.parameters())
    if nbytes > LIMIT:
        raise ExportError(f"the weights take {nbytes / 2**30:.1f} GiB, an ONNX file holds 2: take a smaller size")
    try:
        _write(module, tensors, outputs, path)
    except OSError:  # the disk is full, for one
        raise
    except Exception as error:  # whatever an operator is missing
        first = (str(error).splitlines() or [""])[0]
        raise ExportError(f"the model cannot be written as ONNX [{type(error).__name__}: {first}]") from error


def quantise(source: Path, path: Path) -> None:
    """Write a graph with weights in 8 bits.

    Dynamic quantisation: weights of products and embeddings to 8 bits with a scale per channel, activations by their
    range as they come. Unsigned, since signed products overflow on CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(None):
        quantize_dynamic(str(source), str(path), weight_type=QuantType.QUInt8, per_channel=True)


def session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session of a graph on the CPU.

    Args:
        threads: of an operator; by default onnxruntime's own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _write(module: nn.Module, tensors: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    import onnx

    with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # about names of axes and the exporter's own deprecations
        torch.onnx.export(
            module,
            tuple(tensors.values()),
            str(path),
            input_names=list(tensors),
            output_names=list(outputs),
            dynamic_shapes=(({0: "batch", 1: "tokens"},) * len(tensors),),
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
def _quiet(name: str | None) -> Iterator[None]:
    """Without a logger's advice (of None, of the root's): on what it could do if other packages were there, and such.

    The root has a handler meanwhile, or a warning would give it one that stays.
    """
    logger, nobody = logging.getLogger(name), logging.NullHandler()
    level = logger.level
    logger.addHandler(nobody)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(nobody)
