"""Small sizes without training: a linear reading, at each depth, of what the full model says."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from sentence_transformers import SentenceTransformer

from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection, check_turns, fit_projections
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.data import Examples
from nestling.embed.training.job import ladder_of
from nestling.embed.training.start import SAMPLE, projected_depths
from nestling.errors import ExampleError, OptionError
from nestling.jobs.progress import progress_bar
from nestling.options import flag, text, whole


def align(
    model: SentenceTransformer,
    texts: Iterable[Any],
    ladder: Ladder,
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[dict[int, Projection], dict[str, Any]]:
    """The projections that align small sizes with the full one: what `ElasticEncoder.align` does, and its errors.

    Returns:
        ``{depth: Projection}``, and the number of ``texts``, what was ``left_out``, the ``prompt`` and the
        ``seconds``.
    """
    started = time.monotonic()
    batch_size, progress = whole("batch_size", batch_size), flag("progress", progress)
    prompt = None if prompt is None else text("prompt", prompt)
    examples, parts = Examples.of(texts), Encoder.of(model)
    check_turns(Similarity.of(parts.model))
    if examples.kind != "texts":
        raise ExampleError(f"expected texts without labels, got {examples.kind}: give their texts alone")
    ladder = ladder_of(parts, ladder)
    depths = projected_depths(ladder)
    if not depths:
        raise OptionError(f"the sizes {ladder} are the full model alone: name smaller ones")
    every = examples.texts()
    few = every[:: -(-len(every) // SAMPLE)]
    used = stored_prompts(model)["sts"] if prompt is None else prompt
    with progress_bar(progress) as bar:
        task = bar.add_task("reading texts", total=len(few))
        turns = fit_projections(
            model, [used + said for said in few], depths, batch_size=batch_size,
            advance=lambda count: bar.advance(task, count), prompts=[used] * len(few),
        )  # fmt: skip
    info = {"texts": len(few), "left_out": examples.left_out, "prompt": used}
    return turns, info | {"seconds": round(time.monotonic() - started)}
