"""The maps of trained sizes fitted to a user's own texts, in closed form: near to what they were, in their space."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from nestling.embed.adapter import ElasticAdapter
from nestling.embed.model.encode import encode, stored_prompts
from nestling.embed.model.projection import Projection
from nestling.embed.training.data import Examples
from nestling.embed.training.start import SAMPLE
from nestling.errors import ExampleError, OptionError
from nestling.jobs.progress import progress_bar
from nestling.options import flag, text, whole

NEAR = 3.0  # ridge of the change of a map, in mean variances of a depth's vectors


def refit(
    adapter: ElasticAdapter,
    model: SentenceTransformer,
    texts: Iterable[Any],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[ElasticAdapter, dict[str, Any]]:
    """An adapter whose maps write what the full model says of some texts: what `ElasticEncoder.align` does with one.

    Each map gets the ridge regression of what it is off, so that few texts change it little. The layers, the space
    and the full size stay as they are.

    Returns:
        The adapter, and the number of ``texts``, what was ``left_out``, the ``prompt`` and the ``seconds``.

    Raises:
        OptionError: the adapter follows another teacher, so that the model's own vectors are not in its space.
        ExampleError: there are no texts, or all are the same.
    """
    started, full = time.monotonic(), adapter.sizes.full
    batch_size, progress = whole("batch_size", batch_size), flag("progress", progress)
    if full.layers not in adapter.projections:
        raise OptionError("the adapter follows another teacher, and is not aligned with the model: train it again")
    examples = Examples.of(texts)
    if examples.kind != "texts":
        raise ExampleError(f"expected texts without labels, got {examples.kind}: give their texts alone")
    every = examples.texts()
    few = every[:: -(-len(every) // SAMPLE)]
    used = stored_prompts(model)["sts"] if prompt is None else text("prompt", prompt)
    small = {depth: full.dims for depth in adapter.projections if depth < full.layers}
    with progress_bar(progress) as bar:
        task = bar.add_task("reading texts", total=2 * len(few))

        def read(source: SentenceTransformer, layers: dict[int, int]) -> dict[int, Tensor]:
            return encode(
                source, few, layers, prompt=used, batch_size=batch_size,
                advance=lambda count: bar.advance(task, count),
            )  # fmt: skip

        wanted = adapter.projections[full.layers](read(model, {full.layers: full.dims})[full.layers])
        found = read(adapter.body(model), small)
    projections = dict(adapter.projections)
    for depth, vectors in found.items():
        projections[depth] = nearer(projections[depth], vectors.double(), normalize(wanted, dim=-1).double())
    info = {"texts": len(few), "left_out": examples.left_out, "prompt": used}
    info["seconds"] = round(time.monotonic() - started)
    kept = {name: value for name, value in adapter.info.items() if name != "measured"}
    changed = replace(adapter, projections=projections, info={**kept, "aligned": info})
    return changed.described(model), info


def nearer(turn: Projection, vectors: Tensor, wanted: Tensor) -> Projection:
    """The map with the ridge regression of what it is off; its offset stays where it was."""
    encode_now = turn.encode.detach().cpu().double()
    inputs = vectors - (0 if turn.mean is None else turn.mean.detach().cpu().double())
    written = inputs @ encode_now
    off = wanted * written.norm(dim=-1).mean() - written
    centred = vectors - vectors.mean(0)
    ridge = NEAR * (centred.square().sum() / centred.numel()).clamp_min(1e-12)
    moment = inputs.mT @ inputs / len(inputs) + ridge * torch.eye(len(encode_now), dtype=torch.double)
    return Projection(encode_now + torch.linalg.solve(moment, inputs.mT @ off / len(inputs)), turn.mean, turn.space)
