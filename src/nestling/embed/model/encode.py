"""Embeddings of many texts at every depth that is wanted, from one forward a batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from nestling.data.rows import texts_of
from nestling.embed.ladder import Size
from nestling.embed.model.parts import Encoder
from nestling.embed.model.taps import pooled_taps
from nestling.errors import DataError, EvaluationError
from nestling.options import shown, text, whole

TASKS = {"query": "query", "passage": "document"}  # what stock methods call the uses of a text
DOCUMENTS = ("document", "passage", "corpus")  # names of prompts that are for documents


def widths(sizes: Iterable[Size]) -> dict[int, int]:
    """For each depth among the sizes, the widest vector that one of them takes there."""
    found: dict[int, int] = {}
    for size in sizes:
        found[size.layers] = max(size.dims, found.get(size.layers, 0))
    return found


@torch.no_grad()
def encode(
    model: nn.Module,
    texts: Sequence[str],
    layers: Mapping[int, int],
    *,
    prompt: str = "",
    batch_size: int = 32,
    projections: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    task: str | None = None,
) -> dict[int, Tensor]:
    """The embeddings of texts at several depths. Batches are of texts of like length, longest first.

    The model runs in eval mode, in a copy that shares its weights: others may use it meanwhile.

    Args:
        model: a SentenceTransformer, perhaps wrapped.
        texts: strings; a blank one is embedded too, as its special tokens.
        layers: for each depth, how many of the first coordinates are kept.
        prompt: put in front of every text; the model's stored prompts are not used.
        projections: by depth, what is applied to the pooled vectors ``[B, dims]`` before they are cut; at depths that
            have none, nothing is.
        advance: told how many texts are done, after each batch.
        task: what the model's preprocessing is told that texts are, as by ``encode_query`` ("query") and
            ``encode_document`` ("document"); some models cut them at lengths of their own.

    Returns:
        ``{depth: [n, width]}`` fp32 on the CPU, not normalised, in the order of the texts.

    Raises:
        EvaluationError: a vector is not finite (its text and depth are named).
        LadderError, UnsupportedEncoderError: as `taps`.
    """
    encoder = Encoder.of(model).evaluating()

    def forward(features: dict[str, Any]) -> dict[int, Tensor]:
        found = {}
        for layer, pooled in pooled_taps(encoder, batch_to_device(features, encoder.model.device), layers, {}).items():
            found[layer] = pooled.float()
            if projections is not None and layer in projections:
                with torch.autocast(pooled.device.type, enabled=False):
                    found[layer] = projections[layer](found[layer])
        return found

    options: dict[str, Any] = {"prompt": prompt, "batch_size": batch_size, "advance": advance, "task": task}
    return encode_by(forward, encoder.model, texts, layers, **options)


def encode_by(
    forward: Callable[[dict[str, Any]], Mapping[int, Tensor]],
    model: SentenceTransformer,
    texts: Sequence[str],
    layers: Mapping[int, int],
    *,
    prompt: str = "",
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    task: str | None = None,
) -> dict[int, Tensor]:
    """`encode` by another runtime than torch, which has the other arguments, the result and the errors.

    Args:
        forward: the vectors ``[B, at least width]`` at each depth, of one batch as ``model.preprocess`` makes it.
        model: reads the texts.
    """
    batch_size, prompt = whole("batch_size", batch_size), text("prompt", prompt)
    check_texts(texts)
    found = {layer: torch.empty(len(texts), width) for layer, width in layers.items()}
    told = {} if task is None else {"task": task}
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        features = model.preprocess([texts[i] for i in places], prompt=prompt or None, **told)
        for layer, vectors in forward(features).items():
            cut = vectors[:, : layers[layer]].cpu()
            _check_finite(cut, [texts[i] for i in places], layer)
            found[layer][places] = cut
        advance(len(places))
    return found


def check_texts(texts: Any) -> None:
    """Raises:
    EvaluationError: these are no strings, but one, or others are among them.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise EvaluationError(f"texts={shown(texts)}: expected a list of strings")
    bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if bad is not None:
        raise EvaluationError(f"text {bad + 1}: expected a string, got {shown(texts[bad])}")


def strings_of(texts: Any) -> list[str]:
    """The strings of a list, or those of the column ``text`` of a data frame or a data set.

    Raises:
        EvaluationError: it holds no strings.
    """
    try:
        return list(texts_of(texts))
    except DataError as error:
        raise EvaluationError(str(error)) from error


def encode_prompted(
    model: nn.Module, texts: Sequence[str], prompts: Sequence[str], layers: Mapping[int, int], **options: Any
) -> dict[int, Tensor]:
    """`encode` of texts that have their prompts in front already, each its own, which the model is told of."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    found = {layer: torch.empty(len(texts), width) for layer, width in layers.items()}
    for prompt, some in places.items():
        said = [texts[place].removeprefix(prompt) for place in some]
        for layer, vectors in encode(model, said, layers, prompt=prompt, **options).items():
            found[layer][some] = vectors
    return found


def stored_prompts(model: SentenceTransformer) -> dict[str, str]:
    """The prompts that a model was saved with, by use: ``sts``, ``query`` and ``passage``; "" where it has none.

    They are those of the model's ``encode``, ``encode_query`` and ``encode_document``, but for one: ``passage`` is the
    first of its prompts document, passage and corpus that is not empty. The stock method stops at an empty one, which
    every model has, so that it never uses the prompt "passage" of the E5 family.
    """
    usual = model.prompts.get(model.default_prompt_name or "") or ""

    def first(*names: str) -> str:
        named = [model.prompts[name] for name in names if name in model.prompts]
        return next(filter(None, named), "") if named else usual  # as stock methods do where no such prompt is named

    return {"sts": usual, "query": first("query"), "passage": first(*DOCUMENTS)}


def served_prompts(model: SentenceTransformer) -> dict[str, str]:
    """A model's prompts under the names by which stock methods use them as `stored_prompts` says."""
    stored = stored_prompts(model)
    own = {name: prompt or "" for name, prompt in model.prompts.items()}
    return own | {"query": stored["query"], "document": stored["passage"]}


@contextmanager
def prompts_adopted(model: SentenceTransformer, columns: Mapping[str, str]) -> Iterator[None]:
    """Let a model's own prompts be those of its training, by which it is then measured and served.

    They stay, unless the block fails.

    Args:
        columns: of the training data, with their prompts or "". Columns ``query, passage``, or a first one with
            another prompt than the second, are queries and passages; a prompt of all columns is the one of ``encode``.
    """
    before, prompts = (model.prompts, model.default_prompt_name), served_prompts(model)
    named = {"query", "passage"} <= set(columns)
    every = [columns["query"], columns["passage"]] if named else list(columns.values())
    query, document = [*every, *every][:2]
    if named or query != document:
        prompts |= {"query": query, **{name: document for name in DOCUMENTS if name in prompts}}
    elif not query:
        model.default_prompt_name = None
    elif query != stored_prompts(model)["sts"]:
        model.default_prompt_name = next((name for name, text in prompts.items() if text == query), "trained")
        prompts[model.default_prompt_name] = query
    model.prompts = dict(prompts)
    try:
        yield
    except BaseException:
        model.prompts, model.default_prompt_name = before
        raise


def _check_finite(vectors: Tensor, texts: Sequence[str], layer: int) -> None:
    bad = ~vectors.isfinite().all(-1)
    if bad.any():
        raise EvaluationError(
            f"the embedding at layer {layer} is not finite for {int(bad.sum())} of {len(texts)} texts of a batch, "
            f"such as {texts[int(bad.int().argmax())][:60]!r}: the weights are broken, or training has diverged"
        )
