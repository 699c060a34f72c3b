"""Vectors of documents by ONNX Runtime, on processors: graphs of an encoder that give several depths at once."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from nestling.embed.elastic import ElasticEncoder
from nestling.embed.export.compatibility import inputs
from nestling.embed.export.export import check_fp32
from nestling.embed.export.onnx import CLOSE, TOLERANCE, check_prompts
from nestling.embed.export.probe import SENTENCES, apart, probe_texts
from nestling.embed.export.tracing import check_installed, quantise, session, trace
from nestling.embed.ladder import Size
from nestling.embed.model.encode import TASKS, encode_by, stored_prompts, widths
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity
from nestling.errors import ExportError

NAME = "layers_{}"  # of what a graph gives for a depth


class GraphEncoder:
    """Sizes of an encoder, read from its graphs. Make them with `write_graphs`."""

    def __init__(self, encoder: ElasticEncoder, sizes: Sequence[str], folder: Path):
        """
        Args:
            encoder: that the graphs are of; it reads the texts.
            sizes: those that the graphs were written for.
            folder: where they are. They run on as many threads as torch does.
        """
        self.encoder, self.parts = encoder, encoder.document_parts(sizes)
        threads = torch.get_num_threads()
        self.sessions = [session(_path(folder, number), threads) for number in range(len(self.parts))]

    def encode_document(self, texts: Sequence[str], *, sizes: Sequence[str], batch_size: int) -> dict[str, np.ndarray]:
        """As `ElasticEncoder.encode_document`: fp32 ``[n, dims]`` by the size's name.

        Raises:
            EvaluationError: a vector is not finite.
            OptionError: the model's ``max_seq_length`` lets texts through that it has no positions for.
        """
        similarity, found = Similarity.of(self.encoder.model), dict[str, Tensor]()
        prompt, task = stored_prompts(self.encoder.model)["passage"], TASKS["passage"]
        for (model, _, some), graph in zip(self.parts, self.sessions, strict=True):
            forward = partial(_run, graph, Encoder.of(model), depths := widths(some))
            pooled = encode_by(forward, model, texts, depths, prompt=prompt, batch_size=batch_size, task=task)
            found |= {each.name: similarity.finished(pooled[each.layers][:, : each.dims]) for each in some}
        return {name: found[name].numpy() for name in sizes}


def write_graphs(encoder: ElasticEncoder, sizes: Sequence[str], folder: Path, int8: bool) -> None:
    """Write the graphs that a `GraphEncoder` reads, one for each model that sizes are read from, and try them.

    Args:
        folder: an empty one.
        int8: with weights in 8 bits.

    Raises:
        ExportError: a package is missing, weights are not fp32 or too large for a file, the model leaves prompts out
            of its pooling, it cannot be traced, or the graphs give other vectors: by more than 1e-4 a coordinate, or
            with int8 at a mean cosine below 0.9.
    """
    check_installed()
    check_prompts(encoder.model, [stored_prompts(encoder.model)["passage"]])
    check_fp32(encoder.model)
    for number, (model, projections, some) in enumerate(encoder.document_parts(sizes)):
        _write(model, projections, some, _path(folder, number), int8)
    texts, graphs = probe_texts(encoder.model), GraphEncoder(encoder, sizes, folder)
    wanted = encoder.encode_document(texts, sizes=sizes, batch_size=4)
    for name, vectors in graphs.encode_document(texts, sizes=sizes, batch_size=4).items():
        _compare(name, torch.from_numpy(vectors), torch.from_numpy(wanted[name]), int8)


class _Depths(nn.Module):
    """The pooled and projected vectors of several depths, as a function of tensors."""

    def __init__(self, encoder: Encoder, projections: Mapping[int, Projection], depths: list[int], names: list[str]):
        super().__init__()
        self.model, self.encoder = encoder.model, encoder
        self.turns = nn.ModuleDict({str(depth): turn for depth, turn in projections.items() if depth in depths})
        self.depths, self.names = depths, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, encoder = dict(zip(self.names, tensors, strict=True)), self.encoder
        *between, deepest = self.depths
        with encoder.running(deepest, set(between)) as (runs, states):
            last = runs(dict(features))["token_embeddings"]
        tokens = {number: encoder.ended(number, states[number], last) for number in between} | {deepest: last}
        pooled = {number: encoder.pool(features, tokens[number]) for number in self.depths}
        return tuple(self.turns[str(n)](x) if str(n) in self.turns else x for n, x in pooled.items())


def _write(
    model: SentenceTransformer, projections: Mapping[int, Projection], sizes: list[Size], path: Path, int8: bool
) -> None:
    own = Encoder.of(copy.deepcopy(model).cpu().eval())
    turns = {depth: copy.deepcopy(turn).cpu() for depth, turn in projections.items()}
    depths, names = sorted(widths(sizes)), inputs(model)
    features = own.model.preprocess(list(SENTENCES))
    outputs = [NAME.format(depth) for depth in depths]
    whole = path.with_suffix(".fp32") if int8 else path
    trace(_Depths(own, turns, depths, names).eval(), {name: features[name] for name in names}, outputs, whole)
    if int8:
        quantise(whole, path)
        whole.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.onnx"


def _run(graph: Any, encoder: Encoder, depths: Mapping[int, int], features: dict[str, Any]) -> dict[int, Tensor]:
    encoder.check_length(features)
    feed = {entry.name: features[entry.name].numpy() for entry in graph.get_inputs()}
    found = graph.run([NAME.format(depth) for depth in depths], feed)
    return {depth: torch.from_numpy(vectors) for depth, vectors in zip(depths, found, strict=True)}


def _compare(size: str, found: Tensor, wanted: Tensor, int8: bool) -> None:
    if int8 and not (cosine := float(cosine_similarity(found, wanted, dim=-1).mean())) >= CLOSE:
        raise ExportError(
            f"with int8 weights the mean cosine of {size} to torch's vectors is {cosine:.2f}, expected at least "
            f"{CLOSE}: take the backend onnx"
        )
    if not int8 and not (difference := apart(found, wanted)) <= TOLERANCE:
        raise ExportError(
            f"the ONNX graph's vectors of {size} differ by {difference:.1e}, above {TOLERANCE:.0e}: take the backend "
            "torch"
        )
