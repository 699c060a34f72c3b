"""Sensitivity: what dropping each coordinate does to the predictions, in one unit for all layers, keys and values.

The Fisher information of a mask on each coordinate. With labels y drawn from the model,
``F_i = E[(d log p(y) / d m_i)^2]`` and dropping coordinate i costs about ``F_i / 2`` nats of KL to the full model.
Divided by the tokens of a text it is a KL per token.

It is measured as caches will be read: sinks and recent tokens are exact for every query, so that only what is read
from farther away counts. Most of what a head reads is near, and which heads read far is a small part of what they do.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nestling.errors import CalibrationError, OptionError
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter import BY_COORDINATE, KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import halvable
from nestling.kv.allocation.table import Allocation, by_coordinate
from nestling.kv.cache.rule import capacity
from nestling.kv.calibration.config import CONTEXT, FitConfig
from nestling.kv.calibration.costs import Costs, QuantisationErrors, Samples, between
from nestling.kv.integration.attach import input_device, longest_text, served, text_config
from nestling.kv.simulation.student import Student

LOGITS = 2**26  # at a time: labels are drawn at some of the tokens where all would be more
HALF = 0.5  # of the ranks: where drop costs are measured for use


def sensitivity(
    model,
    adapter: KVAdapter,
    batches: Iterable[Tensor],
    config: FitConfig,
    allocation: Allocation | None = None,
    *,
    positions: Sequence[int] | None = None,
    watch: Sequence[Callable] = (),
) -> dict[str, Tensor]:
    """The KL per token expected from fixing each coordinate at its mean, fp32 ``[L, Hkv, D]`` by side.

    Half the Fisher information of a mask on the coordinate, over the tokens of a row, with labels sampled from the
    model. Cross terms between coordinates are left out. One forward and one backward pass without weight gradients.

    Args:
        batches: token ids ``[B, T]``; every row is one sample of the gradient.
        config: exact tokens, as the caches will keep them, and the seed of the labels.
        allocation: where the masks stand: at 1 for blocks that have bits, at 0 for others. By default all at 1.
        positions: of the first token of each batch; by default 0.
        watch: are shown the same passes, see `Masked`.
    """
    total, tokens = torch.zeros(2, *adapter.shape, dtype=torch.float64), 0
    start = torch.ones_like(total, dtype=torch.float32)
    if allocation is not None:
        start = by_coordinate(allocation.stacked > 0, adapter.shape[2]).float()
    with served(model), torch.enable_grad():
        device, generator = input_device(model), None
        student = Student(model, adapter, sinks=config.sinks, window=config.window).eval()
        for number, ids in enumerate(batches):
            ids = ids.to(device)
            mask = start.to(device).repeat(len(ids), 1, 1, 1, 1).requires_grad_()
            masked = student.weighted(mask)
            masked.watch = watch
            generator = generator or torch.Generator(device).manual_seed(config.seed)
            chosen = some(ids.shape[1], LOGITS // (len(ids) * text_config(model).vocab_size), generator)
            first = positions[number] if positions is not None else 0
            log_p = student.logits(ids, masked, first, chosen).float().log_softmax(-1)
            weight = (ids.shape[1] / log_p.shape[1]) ** 0.5  # so that its square stands for all labels
            with torch.no_grad():
                labels = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator)
            score = log_p.gather(-1, labels.view(*log_p.shape[:2], 1)).sum() * weight
            (gradient,) = torch.autograd.grad(score, mask)
            total += gradient.double().square().sum(0).cpu() / 2
            tokens += ids.numel()
    if not tokens:
        raise CalibrationError("no windows were given to measure the sensitivity")
    return {side: (total[i] / tokens).float() for i, side in enumerate(SIDES)}


def some(count: int, most: int, generator: torch.Generator) -> Tensor | None:
    """The numbers of some of ``count`` tokens, in order, where there are to be fewer."""
    if count <= max(most, 1):
        return None
    return torch.randperm(count, generator=generator, device=generator.device)[: max(most, 1)].sort().values


def at_full_ranks(
    model, adapters: Sequence[KVAdapter], windows: Tensor, config: FitConfig, progress: bool
) -> list[Costs]:
    """What the coordinates of several adapters cost, by one forward pass over long pieces, one text a row, for the
    steps of their quantisers, and one with gradients for their errors.

    The pieces begin at positions from all over the context: keys turn with them, and so what has to be quantised.
    """
    device, context = input_device(model), longest(model, config)
    length = min(config.piece_length, context)
    pieces = [piece for batch in _pieces(model, windows, config, config.pieces, length) for piece in batch.split(1)]
    last = max(context - pieces[0].shape[1], 0)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(config.seed))
    positions = torch.linspace(0, last, len(pieces)).long()[order].tolist()
    samples = [Samples(adapter, device) for adapter in adapters]
    student = Student(model, adapters[0], sinks=config.sinks, window=config.window).eval()
    with served(model), torch.no_grad(), progress_bar(progress) as bar:
        track = bar.track(list(zip(pieces, positions, strict=True)), description="steps of quantisers")
        for ids, first in track:
            student.watched(ids.to(device), samples, first)
    errors = [QuantisationErrors(a, s.steps(), device) for a, s in zip(adapters, samples, strict=True)]
    _drop_costs(model, adapters[0], pieces, config, progress, positions=positions, watch=errors)
    tokens = sum(ids.numel() for ids in pieces)
    return [error.measured(tokens, len(pieces)) for error in errors]


def longest(model, config: FitConfig) -> int:
    """The tokens of the longest texts that costs are measured for.

    Raises:
        OptionError: if they are more than the model reads.
    """
    limit = longest_text(model)
    if config.context is None:
        return min(limit or CONTEXT, CONTEXT)
    if limit and config.context > limit:
        raise OptionError(f"context={config.context} is more than the {limit} tokens that the model reads: give fewer")
    return config.context


def at_half(model, adapter: KVAdapter, windows: Tensor, config: FitConfig, sort: bool, progress: bool) -> KVAdapter:
    """An adapter that has costs, with drop costs at half of its ranks.

    Ranks follow from these, while in a quantised cache, where fewer coordinates are gone, they are worth something
    between that and what they are worth at full ranks.
    """
    adapter = order_by_drop_cost(adapter) if sort else adapter
    half = adapter.allocate(halvable(HALF, adapter.shape[2]), quantise=False)
    batches = _pieces(model, windows, config, config.sensitivity_windows, config.sensitivity_length)
    dropped = _drop_costs(model, adapter, batches, config, progress, allocation=half)
    cost = {
        side: torch.cat((between(full[..., 0], dropped[side])[..., None], full[..., 1:]), -1)
        for side, full in adapter.quantisation_cost.items()
    }
    adapter = replace(adapter, drop_cost=dropped, quantisation_cost=cost)
    return order_by_drop_cost(adapter) if sort else adapter


def _drop_costs(model, adapter: KVAdapter, batches, config: FitConfig, progress: bool, **options) -> dict[str, Tensor]:
    with progress_bar(progress) as bar:
        track = bar.track(batches, description="costs of coordinates")
        return sensitivity(model, adapter, track, config, **options)


def _pieces(model, windows: Tensor, config: FitConfig, count: int, length: int) -> tuple[Tensor, ...]:
    batches = spread(windows, count, length, text_config(model).vocab_size)
    if batches[0].shape[1] <= (exact := capacity(config.sinks, config.window)):
        raise OptionError(
            f"pieces of {batches[0].shape[1]} tokens hold nothing beyond the {exact} exact ones: costs need "
            "longer windows, or fewer sinks and a smaller window"
        )
    return batches


def spread(windows: Tensor, pieces: int, length: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Pieces of ``length`` tokens at even distances from all over the windows ``[n, T]``, in batches.

    Longer pieces than the windows are several in a row.

    Logits of the whole vocabulary are kept with their gradient: small batches for large vocabularies.
    """
    length = min(length, windows.numel())
    if length <= windows.shape[1]:
        rows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    else:
        rows = windows.flatten()[: windows.numel() // length * length].view(-1, length)
    chosen = torch.linspace(0, len(rows) - 1, min(pieces, len(rows))).round().long()
    return rows[chosen].split(max(1, min(8, 2**26 // (vocabulary * length))))


def order_by_drop_cost(adapter: KVAdapter) -> KVAdapter:
    """Sort the coordinates of every head by drop cost, largest first, in place of the closed form's order.

    The closed forms order by the error of logits and of the output, the drop costs by what it does to the predictions.
    """
    order = {side: drop_cost.argsort(-1, descending=True) for side, drop_cost in adapter.drop_cost.items()}
    encode = {s: adapter.encode[s].gather(-1, o[..., None, :].expand_as(adapter.encode[s])) for s, o in order.items()}
    sorted_ones = {
        name: {
            s: values[s].gather(2, o.view(*o.shape, *[1] * len(last)).expand_as(values[s])) for s, o in order.items()
        }
        for name, last in BY_COORDINATE.items()
        if name != "mean" and (values := getattr(adapter, name))  # means are of keys and values
    }
    return replace(adapter, encode=encode, **sorted_ones)  # type: ignore[arg-type]
