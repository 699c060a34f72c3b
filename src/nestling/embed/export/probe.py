"""Texts that two versions of an encoder are compared on, and how far a size's folder is from what was trained."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from nestling.embed.ladder import Size
from nestling.embed.model.encode import TASKS, encode, stored_prompts
from nestling.embed.model.layers import positions_of
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity
from nestling.errors import ExportError

SENTENCES = (
    "Water.",
    "The lighthouse keeper wrote down the weather every evening.",
    "How many layers does a small encoder need before its vectors are of any use in a search engine?",
)
LENGTHS = (1, 2, 5, 13, 40)  # tokens
LONG = 512  # tokens: a model that reads no more of a text is given one that it has to cut
SEED = 0
TOLERANCE = 1e-5  # of coordinates; of long vectors, in parts of the largest one


def probe_texts(model: SentenceTransformer) -> list[str]:
    """Sentences, and random tokens of the model's own vocabulary in several lengths, so that any tokenizer is served.

    The same for the same model. One is longer than what the model reads, unless it reads more than 512 tokens, or says
    that it reads more than it has positions for.
    """
    tokenizer = model.tokenizer
    usual = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    rng = random.Random(SEED)
    made = [tokenizer.decode(rng.sample(usual, min(length, len(usual)))) for length in LENGTHS]
    limit, reads = positions_of(model[0]), model.max_seq_length
    if reads is not None and reads <= LONG and (limit is None or reads <= limit):
        made.insert(0, tokenizer.decode(rng.choices(usual, k=reads + 8)))
    return [*SENTENCES, *(text for text in made if text.strip())]


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of a coordinate of vectors ``[n, d]``, in parts of the largest one if that is above 1."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


@torch.no_grad()
def difference(encoder: Encoder, size: Size, projection: Projection | None, served: SentenceTransformer) -> float:
    """How far a size's folder, as stock code loads it, is from the taps.

    Without a prompt, and by each stock method with the prompt that training and measuring use for it.

    Raises:
        ExportError: more than the tolerance, or the folder gives vectors of another width.
    """
    texts, similarity = probe_texts(encoder.model), Similarity.of(encoder.model)
    projections = None if projection is None else {size.layers: projection}
    served.eval()
    methods: dict[str, Any] = {"sts": served.encode, "query": served.encode_query, "passage": served.encode_document}
    calls: list[Any] = [("", None, partial(served.encode, prompt=""))]
    calls += [(prompt, TASKS.get(use), methods[use]) for use, prompt in stored_prompts(encoder.model).items()]
    worst = 0.0
    for prompt, task, method in calls:
        pooled = encode(
            encoder.model, texts, {size.layers: size.dims}, prompt=prompt, projections=projections, task=task
        )[size.layers]
        wanted, found = similarity.finished(pooled), torch.as_tensor(method(texts, show_progress_bar=False))
        if found.shape != wanted.shape:
            raise ExportError(f"the export gives vectors of width {found.shape[1]}, expected {size.dims}")
        differs = apart(found, wanted)
        if not differs <= TOLERANCE:
            raise ExportError(
                f"the export's vectors differ from the model's by {differs:.1e}, above {TOLERANCE:.0e}"
                f"{f', with the prompt {prompt!r}' if prompt else ''}"
            )
        worst = max(worst, differs)
    return worst
