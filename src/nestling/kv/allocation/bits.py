"""From a budget to bits: how many each block of eight coordinates is stored with, none to sixteen.

One allocator over ranks and precision. A block costs its bits, and loses what was measured: at no bits the drop
costs of its coordinates, at b bits their quantisation costs (KL per token if each coordinate was off by as much as it
varies) times the error of a quantiser of b bits. On the lower hull of these points every further bit gains less than
the one before, so taking all steps of all blocks in order of gain per bit is the optimum of reverse water-filling, for
every budget at once: the bits at a smaller budget are never more than those at a larger one, in any block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocation.ranks import Units, nested
from nestling.kv.allocation.steps import Steps
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.quantisation.quantiser import WIDTHS

CHOICES = (0, *WIDTHS, 16)


@dataclass(frozen=True)
class BitTable:
    """Bits of every block of coordinates: ``keys`` and ``values``, int64 ``[L, Hkv, blocks]``."""

    keys: Tensor
    values: Tensor

    @property
    def stacked(self) -> Tensor:
        """Keys and values in one tensor, ``[2, L, Hkv, blocks]``."""
        return torch.stack((self.keys, self.values))

    @property
    def bits(self) -> int:
        """Bits stored per token, keys and values of all layers."""
        return int(self.stacked.sum()) * COORDINATES_PER_BLOCK

    def groups(self, row: int) -> list[tuple[list[int], tuple[tuple[int, ...], tuple[int, ...]]]]:
        """The heads of a layer that have the same bits: (heads, (bits of keys, of values)), most bits first."""
        pairs = [tuple(tuple(side[row, h].tolist()) for side in (self.keys, self.values)) for h in range(self.heads)]
        return [([h for h, p in enumerate(pairs) if p == pair], pair) for pair in sorted(set(pairs), reverse=True)]  # type: ignore[misc]

    def token_bytes(self, width: int, itemsize: int) -> list[int]:
        """Bytes of the coordinates of a token in each layer, of heads of ``width``: those of 16 bits have ``itemsize``
        bytes each, and b bits of the eight of a block are b bytes."""
        stacked = self.stacked
        first = COORDINATES_PER_BLOCK * torch.arange(stacked.shape[-1])
        sizes = (width - first).clamp(max=COORDINATES_PER_BLOCK) * itemsize
        return torch.where(stacked == 16, sizes, stacked).sum((0, 2, 3)).tolist()

    def full(self, width: int) -> list[bool]:
        """For each layer, whether nothing of it is compressed."""
        return (self.stacked == 16).flatten(2).all(2).all(0).tolist()

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    def check(self, layers: int, heads: int, width: int) -> None:
        """Raise `BudgetError` unless the table fits ``layers`` x ``heads`` heads of ``width`` coordinates."""
        shape = [layers, heads, -(-width // COORDINATES_PER_BLOCK)]
        for name, bits in (("keys", self.keys), ("values", self.values)):
            if bits.dtype != torch.int64:
                raise BudgetError(f"bit table: {name} are {bits.dtype}, expected whole numbers, torch.int64")
            if list(bits.shape) != shape:
                raise BudgetError(f"bit table: {name} is {list(bits.shape)}, expected {shape}")
            if wrong := sorted(set(bits.flatten().tolist()) - set(CHOICES)):
                raise BudgetError(f"bit table: {name} holds {wrong[0]} bits, expected some of {CHOICES}")


def losses(drop_cost: Tensor, quantisation_cost: Tensor, errors: Tensor) -> Tensor:
    """What every block loses at each of `CHOICES`, in nats per token: ``[2, L, Hkv, blocks, choices]``.

    Args:
        drop_cost, quantisation_cost: ``[2, L, Hkv, D]``.
        errors: of the quantisers of `WIDTHS` on keys and values, as shares of the mean squares, ``[2, widths]``.
    """
    missing = -drop_cost.shape[-1] % COORDINATES_PER_BLOCK
    lost = quantisation_cost[..., None] * errors[:, None, None, None]
    all_of_them = torch.cat((drop_cost[..., None], lost, torch.zeros_like(drop_cost[..., None])), -1)
    padded = torch.nn.functional.pad(all_of_them, (0, 0, 0, missing))
    return padded.unflatten(-2, (-1, COORDINATES_PER_BLOCK)).sum(-2)


def by_bits(lost: Tensor, bits: float) -> BitTable:
    """The table with the least loss of those with at most ``bits`` per token, to within one step.

    Heads of a layer are in at most `MAX_GROUPS` groups.

    Args:
        lost: as from `losses`.

    Raises:
        BudgetError: if a loss is not finite, or not even one bit of one block fits.
    """
    return bit_table_of(bit_steps(lost), bits)


def bit_table_of(steps: Steps, bits: float) -> BitTable:
    """The bit table of some bits per token.

    Raises:
        BudgetError: if they are fewer than the smallest step takes.
    """
    if (table := steps.table(bits)) is None:
        raise BudgetError(
            f"bits={bits:g} per token are fewer than the smallest step takes: give at least bits={steps.least:g}"
        )
    return BitTable(table[0], table[1])


def bit_steps(lost: Tensor) -> Steps:
    """The steps of all blocks in order of gain per bit, for heads of a layer in at most `MAX_GROUPS` groups.

    Raises:
        BudgetError: if a loss is not finite, or no block is worth any bits.
    """
    if not torch.isfinite(lost).all():
        raise BudgetError("losses must be finite: calibrate the adapter again")
    steps = nested(lambda units: _steps(lost.double(), units), *lost.shape[1:3])
    if not len(steps.place):
        raise BudgetError("no coordinate is worth any bits by the losses of this adapter: calibrate it again")
    return steps


def _steps(lost: Tensor, units: Units) -> Steps:
    """Steps from no bits, in order of gain per bit."""
    layers, heads, blocks = lost.shape[1:4]
    found = []
    for layer, groups in enumerate(units):
        for unit in groups:
            mean = lost[:, layer, unit].mean(1).tolist()
            for side, block in ((side, block) for side in (0, 1) for block in range(blocks)):
                places = [((side * layers + layer) * heads + head) * blocks + block for head in unit]
                found += [
                    (-gain, (block, side, layer, unit[0]), (places, choice, cost * len(unit)))
                    for gain, choice, cost in hull(mean[side][block])
                    if gain > 0
                ]
    found.sort(key=lambda step: step[:2])
    start = torch.zeros(lost.shape[:-1], dtype=torch.int64)
    return Steps.of(start, 0, (step for _, _, step in found), any_start=False)


def hull(lost: Sequence[float]) -> list[tuple[float, int, int]]:
    """Steps on the lower hull of a block's losses: (gain per bit, bits from there on, bits more per token)."""
    found, at = [], 0
    while at < len(CHOICES) - 1:
        slopes = [
            ((lost[at] - lost[to]) / (COORDINATES_PER_BLOCK * (CHOICES[to] - CHOICES[at])), to)
            for to in range(at + 1, len(CHOICES))
        ]
        gain, to = max(slopes, key=lambda slope: (slope[0], slope[1]))
        found.append((gain, CHOICES[to], COORDINATES_PER_BLOCK * (CHOICES[to] - CHOICES[at])))
        at = to
    return found
