"""Small cups without training: a linear reading, at each depth, of what the full model says; saved like a training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from nestling.embed.export.card import aligned_card
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.folder import check_place
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import check_turns, fit_projections
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.data import Examples
from nestling.embed.training.job import ladder_of
from nestling.embed.training.result import Trained, save, weight_bytes
from nestling.embed.training.start import SAMPLE, turned_depths
from nestling.errors import ExampleError, OptionError
from nestling.jobs.progress import progress_bar
from nestling.options import flag, path, text, whole


def align(
    model: SentenceTransformer,
    texts: Iterable[Any],
    cups: Ladder | str | Iterable[Any] | None = None,
    *,
    folder: str | Path,
    prompt: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Trained:
    """Save a model whose small cups are aligned with it in closed form, from one pass over texts without labels.

    What it writes is what `train` writes, with the projections that a training would start from (see
    `fit_projections`): exports and measurements take it as they do a trained one. The weights stay as they are, and so
    does the full cup, unless narrower ones share its depth: then its vectors are centred like theirs.

    Args:
        model: a SentenceTransformer.
        texts: some thousands like those that will be embedded, as strings or rows with a column ``text``, in a list, a
            data frame, a data set or any iterable; 10,000 of them, from all over, are read.
        cups: the ladder, in any form that `Ladder.parse` takes; `Ladder.default` of the model if None.
        folder: of the result, must not exist.
        prompt: in front of each text; by default the one that the model's ``encode`` uses by itself.
        batch_size: texts in a forward.
        progress: show a progress bar.

    Returns:
        `Trained`; ``info`` has the number of ``texts``, what was ``left_out``, the ``prompt`` and the ``seconds``, and
        an empty ``curve``.

    Raises:
        ExampleError: there are no texts, one is blank or no string, or all are the same.
        LadderError, UnsupportedEncoderError: the cups do not fit the model.
        OptionError: an option cannot be, or all cups have the model's depth and width, so that there is nothing to
            align.
        TrainingError: the folder exists.
    """
    out, started = path("folder", folder), time.monotonic()
    batch_size, progress = whole("batch_size", batch_size), flag("progress", progress)
    prompt = None if prompt is None else text("prompt", prompt)
    check_place(out, "alignment", resume=False, nbytes=weight_bytes(model))
    examples, parts = Examples.of(texts), Encoder.of(model)
    check_turns(Similarity.of(parts.model))
    if examples.kind != "texts":
        raise ExampleError(f"expected texts without labels, got {examples.kind}: give their texts alone")
    ladder = ladder_of(parts, cups)
    depths = turned_depths(ladder)
    if not depths:
        raise OptionError(f"the ladder {ladder} has the full model alone: name smaller cups")
    given = examples.texts()
    few = given[:: -(-len(given) // SAMPLE)]
    used = stored_prompts(model)["sts"] if prompt is None else prompt
    with progress_bar(progress) as bar:
        task = bar.add_task("reading texts", total=len(few))
        turns = fit_projections(
            model, [used + said for said in few], depths, batch_size=batch_size,
            advance=lambda count: bar.advance(task, count), prompts=[used] * len(few),
        )  # fmt: skip
    info = {"texts": len(few), "left_out": examples.left_out, "prompt": used}
    info |= {"seconds": round(time.monotonic() - started), "curve": []}
    aligned = Trained(out, ladder, turns, info)
    save(model, aligned, "alignment", aligned_card(model, ladder, info, turns))
    return aligned
