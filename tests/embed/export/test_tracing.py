"""Graphs in 8 bits, and what is printed meanwhile: nothing, now or later."""

import logging

import numpy as np
import pytest

from nestling.embed.export import tracing
from nestling.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def product(path):
    """A graph that multiplies ``[batch, 64]`` by a matrix of 64 x 8."""
    helper, numbers = onnx.helper, np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", 64), ("y", 8))
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", tensors[:1], tensors[1:],
        [onnx.numpy_helper.from_array(numbers, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return numbers


def test_eight_bits_are_close_and_say_nothing(tmp_path, capfd):
    numbers, handlers = product(tmp_path / "whole.onnx"), logging.getLogger().handlers[:]
    tracing.quantise(tmp_path / "whole.onnx", tmp_path / "small.onnx")
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    (found,) = tracing.session(tmp_path / "small.onnx", threads=1).run(None, {"x": x})
    wanted = x @ numbers
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert capfd.readouterr() == ("", "") and logging.getLogger().handlers == handlers


def test_packages_that_are_missing_are_named(monkeypatch):
    tracing.check_installed()
    monkeypatch.setattr(tracing, "PACKAGES", ("onnx", "onnxruntine"))
    with pytest.raises(ExportError, match=r"ONNX needs onnxruntine: pip install 'nestling\[onnx\]'"):
        tracing.check_installed()
