"""Costs measured again where small caches are: blocks that were thought cheap to drop, and are not.

A few that cost little by themselves cost a hundred times as much once others are gone, and a cache that drops one of
them loses as much by it as by all the rest. So allocations of small budgets are tried: with every error scaled by s,
half the derivative of the KL by s at s = 1 is what a coordinate adds to it there, whatever it has in common with
others. One pass with gradients measures it for all coordinates, on the predictions themselves and not on samples.

Costs are raised and never lowered: where a block was dropped, nothing says what it would cost in company that was not
tried. Other bits than none are left alone as well, since with these corrected, too, caches were measured to be worse.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.jobs.progress import progress_bar
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.allocate import by_block, losses_of
from nestling.kv.allocation.table import CHOICES, Allocation, by_coordinate
from nestling.kv.calibration.choice import can_choose
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.costs import TINY, Coordinates
from nestling.kv.calibration.sensitivity import LOGITS, longest, some, spread
from nestling.kv.integration.attach import input_device, served, text_config
from nestling.kv.quantisation.quantiser import rounded
from nestling.kv.simulation.student import Student

SHARES = (0.175, 0.0875, 0.045)  # of the bits of all coordinates, one after the other
PARTS = 4  # of a piece, which lie all over the context
RATIO = 2.0  # of what was measured and what was predicted, from which on costs are raised
LEAST = 0.003  # of what all blocks cost together: less than that is noise


@dataclass
class Scaled:
    """Keys and values as they are read from quantised coordinates, with their errors scaled; see `Masked`.

    Attributes:
        bits: of each coordinate, ``[2, L, Hkv, D]``.
        step: of quantisers, likewise.
        scale: of errors, likewise; 1 is the cache's. A gradient passes through it and through ``states``, for which
            errors count as fixed.
    """

    coordinates: Coordinates
    bits: Tensor
    step: Tensor
    scale: Tensor

    def __call__(self, states: Tensor, side: int, row: int, positions: Tensor) -> Tensor:
        z = self.coordinates.of(side, row, states)
        bits, step, scale = (part[side, row, :, None] for part in (self.bits, self.step, self.scale))
        error = torch.zeros_like(z)
        for width in bits.unique().tolist():
            if width in CHOICES[:-1]:
                read = rounded(z, step, width) if width else self.coordinates.dropped(side, row, positions)
                error = torch.where(bits == width, read - z, error)
        return states + self.coordinates.states(side, row, error * scale).to(states.dtype)


def corrected(model, adapter: KVAdapter, windows: Tensor, config: FitConfig, *, progress: bool = True) -> KVAdapter:
    """The adapter with larger costs of dropping some blocks.

    Of models whose decoder does not give its last hidden states they stay as they are.

    Args:
        adapter: with costs of quantisation.
        windows: token ids ``[n, T]``; pieces are taken from all over them.
        config: length of the pieces, and exact tokens.
    """
    if not can_choose(model):
        return adapter
    pieces = torch.cat(spread(windows, config.correction_pieces, min(config.piece_length, longest(model, config)), 1))
    with progress_bar(progress) as bar:
        task = bar.add_task("costs at small budgets", total=len(SHARES) * len(pieces))
        for share in SHARES:
            try:
                allocation = adapter.allocate(share)
            except BudgetError:  # heads so small that there is nothing to leave out
                bar.advance(task, len(pieces))
                continue
            measured = []
            for ids in pieces:
                measured.append(added(model, adapter, allocation, ids, config))
                bar.advance(task)
            adapter = raised(adapter, allocation, torch.stack(measured).mean(0))
    return adapter


def added(model, adapter: KVAdapter, allocation: Allocation, ids: Tensor, config: FitConfig) -> Tensor:
    """What the error of each coordinate adds to the KL of a text ``[T]`` at an allocation, fp64 ``[2, L, Hkv, D]``.

    The KL is of some of the tokens where the vocabulary is large."""
    device = input_device(model)
    generator, positions = torch.Generator(device).manual_seed(config.seed), apart(len(ids), longest(model, config))
    tokens = some(len(ids), LOGITS // text_config(model).vocab_size, generator)
    with served(model), torch.enable_grad():
        student = Student(model, adapter, sinks=config.sinks, window=config.window).eval()
        scale = torch.ones(2, *adapter.shape, device=device, requires_grad=True)
        step = torch.stack([adapter.step[side] for side in SIDES]).to(device)
        bits = by_coordinate(allocation.stacked, adapter.shape[2]).to(device)
        read = Scaled(Coordinates(adapter, device), bits, step, scale)
        loss = student.distance(ids[None].to(device), student.reading(read), tokens, positions.to(device))
        (gradient,) = torch.autograd.grad(loss, scale)
    return gradient.double().cpu() / 2


def apart(tokens: int, context: int) -> Tensor:
    """Positions ``[tokens]`` of a piece whose parts are spread over a context.

    Keys turn with their positions, some of their coordinates so slowly that they are all but the same throughout a
    piece, which attention does not mind. Only tokens that are as far apart as in long texts tell what those are worth.
    """
    part = -(-tokens // PARTS)
    gap = max(context - tokens, 0) // max(-(-tokens // part) - 1, 1)
    places = torch.arange(tokens)
    return places + places // part * gap


def raised(adapter: KVAdapter, allocation: Allocation, measured: Tensor) -> KVAdapter:
    """The adapter with larger costs of dropping the blocks that an allocation drops at a higher cost than predicted.

    They are raised to the geometric mean of both: what was measured holds for long texts and for that allocation.

    Args:
        measured: as `added` gives it.
    """
    predicted, cost = losses_of(adapter)[..., 0], by_block(measured)
    total = float(cost.sum())
    wrong = (allocation.stacked == 0) & (cost > RATIO * predicted) & (cost > LEAST * total)
    ratio = torch.where(wrong, (cost / predicted.clamp_min(TINY)).sqrt(), 1.0)
    factor = by_coordinate(ratio, adapter.shape[2]).float()
    costs = {side: adapter.quantisation_cost[side].clone() for side in SIDES}
    for place, side in enumerate(SIDES):
        costs[side][..., 0] *= factor[place]
    return replace(adapter, quantisation_cost=costs)
