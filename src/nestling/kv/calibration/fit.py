"""Calibration: nested bases for a model from text alone, without training."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nestling.data.texts import read_texts
from nestling.data.windows import token_windows
from nestling.errors import OptionError
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter import KVAdapter
from nestling.kv.cache.rule import SKIP, capacity
from nestling.kv.calibration.choice import WINDOWS, can_choose, choose
from nestling.kv.calibration.config import AUTO, BASES, FitConfig
from nestling.kv.calibration.correction import corrected
from nestling.kv.calibration.drift import key_drift
from nestling.kv.calibration.moments import collect_moments, make_bases
from nestling.kv.calibration.pace import paced
from nestling.kv.calibration.sensitivity import at_full_ranks, at_half, longest
from nestling.kv.integration.attach import check_support, leaves_as_found, longest_text, text_config
from nestling.kv.integration.gradients import check_gradients
from nestling.kv.integration.modes import in_default_mode
from nestling.options import flag


@leaves_as_found
@in_default_mode
def fit(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    config: FitConfig | None = None,
    *,
    progress: bool = True,
) -> KVAdapter:
    """Calibrate nested bases for a model's KV cache. No training: a pass over text, and two over a part of it.

    Args:
        model: a causal LM of transformers; left as it is.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``. Text like that of the later use, as long as can be had.
        config: which bases, and how much is measured.
        progress: show progress bars with an estimate of the time left.

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
    config, progress = FitConfig.of(config), flag("progress", progress)
    check_support(model)
    lm_config = text_config(model)
    length = min(config.length, longest_text(lm_config) or config.length)
    shortest = min(length, config.sensitivity_length)
    if shortest <= (exact := capacity(config.sinks, config.window)):
        raise OptionError(
            f"length={config.length}, sensitivity_length={config.sensitivity_length}: pieces of {shortest} tokens "
            f"hold nothing beyond the {exact} exact ones (sinks={config.sinks}, window={config.window}), costs "
            "need more"
        )
    if length <= SKIP:
        raise OptionError(f"length={length}: windows need more than the {SKIP} leading tokens, which are left out")
    check_gradients(model)
    if config.basis == AUTO and not can_choose(model):
        config = replace(config, basis=BASES[0])
    count, auto = max(1, config.tokens // length), config.basis == AUTO
    windows = torch.stack(list(token_windows(tokenizer, texts, length, limit=count + WINDOWS * auto)))
    if config.minutes is not None:
        config = paced(model, windows, config)
        count, auto = max(1, config.tokens // length), config.basis == AUTO
        windows = windows[: count + WINDOWS * auto]
    held_out = windows
    if auto and len(windows) > 1:
        count = min(count, max(1, len(windows) - WINDOWS))
        windows, held_out = windows[:count], windows[count:][:WINDOWS]
    if auto and tokenizer is not None:  # bases that fit one kind of text best may fail on another
        pages = torch.stack(list(token_windows(tokenizer, read_texts(None), length, limit=WINDOWS)))
        held_out = torch.cat((held_out[: WINDOWS // 2], pages[: WINDOWS // 2]))
    batches = windows.split(max(1, config.batch_tokens // length))
    with progress_bar(progress) as bar:
        moments = collect_moments(model, bar.track(batches, description="moments"))
        task = bar.add_task("bases", total=1)
        names = BASES if auto else (config.basis,)
        bases = {name: make_bases(model, moments, name) for name in names}
        bar.advance(task)
    info = {
        "basis": config.basis,
        "base_model": Path(lm_config.name_or_path).name if lm_config.name_or_path else None,
        "tokens": len(windows) * length,
        "length": length,
        "skip": SKIP,
        "sinks": config.sinks,
        "window": config.window,
        "context": longest(model, config),
    }
    adapters = {}
    for name, pairs in bases.items():
        means = {i: m.means(name) for i, m in moments.items()}
        adapters[name] = KVAdapter.from_bases(lm_config, pairs, means, info)
    with progress_bar(progress) as bar:
        drift = key_drift(model, next(iter(adapters.values())), windows, config, bar)
    adapters = {name: replace(adapter, drift=drift) for name, adapter in adapters.items()}
    costs = at_full_ranks(model, [*adapters.values()], windows, config, progress)
    if auto:
        candidates = dict(zip(adapters, zip(adapters.values(), costs, strict=True), strict=True))
        with progress_bar(progress) as bar:
            adapter = choose(model, candidates, held_out, config, bar)
    else:
        adapter = costs[0].of(adapters[config.basis])
    condition = max(float(torch.linalg.cond(encode.double()).max()) for encode in adapter.encode.values())
    adapter.info["condition"] = round(condition, 4)  # of bases in fp32: an orthogonal one has 1
    adapter = at_half(model, adapter, windows, config, sort=config.basis != "pca", progress=progress)
    return corrected(model, adapter, windows, config, progress=progress)


def measure(
    model,
    adapter: KVAdapter,
    windows: Tensor,
    config: FitConfig,
    *,
    sort: bool = False,
    progress: bool = True,
) -> KVAdapter:
    """The adapter with what its coordinates are worth, measured on pieces of text.

    At full ranks, on long pieces; at half of the ranks that follow from that pass, since what coordinates are worth
    depends on which others are gone; and at what small budgets leave, where dropping some costs more than they say.

    Args:
        windows: token ids ``[n, T]``; the pieces are taken from all over them.
        config: number and length of the pieces, their positions, exact tokens, and the seed of the labels.
        sort: put the coordinates of every head in the order of their drop costs.

    Raises:
        OptionError: if a piece holds no more than the exact tokens.
    """
    if adapter.drift is None:
        with progress_bar(progress) as bar:
            adapter = replace(adapter, drift=key_drift(model, adapter, windows, config, bar))
    (costs,) = at_full_ranks(model, [adapter], windows, config, progress)
    adapter = at_half(model, costs.of(adapter), windows, config, sort, progress)
    return corrected(model, adapter, windows, config, progress=progress)
