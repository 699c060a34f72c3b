"""Calibration: nested bases for a model from text alone, without training."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nestling.data.windows import token_windows
from nestling.errors import OptionError
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter import SINKS, WINDOW, KVAdapter
from nestling.kv.cache.exact import SKIP, capacity
from nestling.kv.calibration.moments import BASES, collect_moments, make_bases
from nestling.kv.calibration.sensitivity import LENGTH, PIECES, measure
from nestling.kv.integration import attach as attention
from nestling.kv.integration.gradients import check_gradients
from nestling.kv.integration.modes import in_default_mode
from nestling.options import choice, flag, whole


@attention.leaves_as_found
@in_default_mode
def fit(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    basis: str = "balanced",
    *,
    tokens: int = 65536,
    length: int = 1024,
    batch_tokens: int = 4096,
    sensitivity_windows: int = PIECES,
    sensitivity_length: int = LENGTH,
    sinks: int = SINKS,
    window: int = WINDOW,
    skip: int = SKIP,
    seed: int = 0,
    progress: bool = True,
) -> KVAdapter:
    """Calibrate nested bases for a model's KV cache. No training: a pass over text, and two over a part of it.

    Args:
        model: a causal LM of transformers; left as it is.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``. Text like that of the later use, as long as can be had.
        basis: ``"balanced"`` (query-aware keys, values weighed by the output projection) or ``"pca"`` (the paper's).
        tokens: tokens for the moments; all of the text is used if it is shorter.
        length: tokens per window. Post-RoPE statistics depend on the positions that were seen.
        batch_tokens: tokens per forward pass.
        sensitivity_windows, sensitivity_length: number and length of the pieces on which energies are measured, at
            half of the ranks; before that roughly, on half as many, at all ranks.
        sinks, window: exact tokens, as the caches will keep them: what is read from them costs nothing. 0 and 0 for
            caches with ``paper=True``.
        skip: leading positions of each window that are left out.
        seed: for the labels that the model draws.
        progress: show a progress bar with an estimate of the time left.

    Returns:
        A `KVAdapter` that serves every budget.

    Raises:
        TextTooShortError: if there is not one window of text.
        OptionError: if an option has a value that it cannot have, or windows are no longer than the exact tokens.
        CalibrationError: if a statistic is not finite (the layer is named).
        UnsupportedModelError: if the model's cache cannot be compressed; the message says why.

    Warns:
        UserWarning: if the output projection of a layer is not found, by which errors of values are weighed.
    """
    choice("basis", basis, BASES)
    tokens, length, batch_tokens = (
        whole("tokens", tokens),
        whole("length", length),
        whole("batch_tokens", batch_tokens),
    )
    pieces = whole("sensitivity_windows", sensitivity_windows)
    piece = whole("sensitivity_length", sensitivity_length)
    sinks, window, skip = (
        whole(name, value, minimum=0) for name, value in (("sinks", sinks), ("window", window), ("skip", skip))
    )
    seed, progress = whole("seed", seed, 0, 2**32 - 1), flag("progress", progress)
    attention.check_support(model)
    config = attention.text_config(model)
    positions = getattr(config, "max_position_embeddings", None) or length
    if min(length, positions) <= skip:
        raise OptionError(f"skip={skip} leaves nothing of windows of {min(length, positions)} tokens")
    check_gradients(model)
    length = min(length, positions)
    windows = torch.stack(list(token_windows(tokenizer, texts, length, limit=max(1, tokens // length))))
    shortest = min(length, piece)
    if shortest <= (exact := capacity(sinks, window)):
        raise OptionError(
            f"length={length}, sensitivity_length={piece}: pieces of {shortest} "
            f"tokens hold nothing beyond the {exact} exact ones (sinks={sinks}, window={window}), energies need more"
        )
    batches = windows.split(max(1, batch_tokens // length))
    with progress_bar(progress) as bar:
        moments = collect_moments(model, bar.track(batches, description="moments"), skip=skip)
    bases = make_bases(model, moments, basis)
    info = {
        "basis": basis,
        "base_model": Path(config.name_or_path).name if config.name_or_path else None,
        "tokens": len(windows) * length,
        "length": length,
        "skip": skip,
        "sinks": sinks,
        "window": window,
        "condition": max(float(b.condition.max()) for pair in bases.values() for b in pair),
    }
    means = {i: m.means(basis) for i, m in moments.items()}
    adapter = KVAdapter.from_bases(config, bases, means, info)
    return measure(
        model, adapter, windows, pieces=pieces, length=piece, sinks=sinks, window=window,
        sort=basis == "balanced", seed=seed, progress=progress,
    )  # fmt: skip
