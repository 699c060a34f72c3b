"""An allocation: the bits of every block of eight coordinates, of all layers and KV heads, keys and values.

A rank is 16 bits for the first blocks of a head and none for the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.errors import BudgetError
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.quantisation.quantiser import WIDTHS

RANKS = (0, FULL_BITS)  # bits of a block where coordinates are kept as they are or not at all
CHOICES = (0, *WIDTHS, FULL_BITS)
EXPECTED_TABLE = (
    "an allocation is {'keys': ..., 'values': ...} of whole numbers: ranks [L][Hkv] or bits of blocks [L][Hkv][blocks]"
)


def block_sizes(width: int) -> Tensor:
    """Coordinates in each block of a head of ``width``: the last one may have fewer than the others."""
    return (width - torch.arange(0, width, COORDINATES_PER_BLOCK)).clamp(max=COORDINATES_PER_BLOCK)


def by_coordinate(by_block: Tensor, width: int) -> Tensor:
    """What each coordinate of a head has of its block's, ``[..., blocks]`` to ``[..., D]``."""
    return by_block.repeat_interleave(COORDINATES_PER_BLOCK, -1)[..., :width]


def first_blocks(counts: Tensor, blocks: int) -> Tensor:
    """16 bits for the first ``counts`` ``[...]`` of some blocks, none for the others: ``[..., blocks]``."""
    return FULL_BITS * (torch.arange(blocks) < counts[..., None])


def bits_of_ranks(ranks: Tensor, width: int) -> Tensor:
    """16 bits for each block of coordinates that ranks ``[...]`` reach: ``[..., blocks]``.

    Raises:
        BudgetError: for a rank that is no multiple of 8 and not the whole width, or out of range.
    """
    wrong = (ranks < 1) | (ranks > width) | ((ranks % COORDINATES_PER_BLOCK != 0) & (ranks != width))
    if wrong.any():
        raise BudgetError(
            f"ranks must be multiples of {COORDINATES_PER_BLOCK} or the whole width, {width}: "
            f"got {int(ranks[wrong].flatten()[0])}"
        )
    return first_blocks((ranks + COORDINATES_PER_BLOCK - 1) // COORDINATES_PER_BLOCK, len(block_sizes(width)))


@dataclass(frozen=True, eq=False)
class Allocation:
    """Bits of every block of coordinates: 0 to 8, or 16 where coordinates are kept as they are.

    Attributes:
        keys, values: int64 ``[L, Hkv, blocks]``.
        width: of the heads, in coordinates.
    """

    keys: Tensor
    values: Tensor
    width: int

    @classmethod
    def of_ranks(cls, keys: Tensor, values: Tensor, width: int) -> "Allocation":
        """From ranks, int64 ``[L, Hkv]`` each: how many coordinates of 16 bits every head keeps.

        Raises:
            BudgetError: for a rank that is no multiple of 8 and not the whole width, or out of range.
        """
        return cls(bits_of_ranks(keys, width), bits_of_ranks(values, width), width)

    @classmethod
    def of_dict(cls, table: Mapping[str, Any], width: int) -> "Allocation":
        """From what `to_dict` gives, or from ranks, ``[L][Hkv]``.

        Raises:
            BudgetError: it is no such table.
        """
        try:
            keys, values = (torch.tensor(table[side]) for side in ("keys", "values"))
            if not keys.dtype == values.dtype == torch.int64:
                raise TypeError("not whole numbers")  # a fraction is not rounded in silence
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BudgetError(f"{EXPECTED_TABLE} ({error})") from error
        return cls.of_ranks(keys, values, width) if keys.ndim == values.ndim == 2 else cls(keys, values, width)

    def to_dict(self) -> dict[str, list[list[list[int]]]]:
        return {"keys": self.keys.tolist(), "values": self.values.tolist()}

    @property
    def stacked(self) -> Tensor:
        """Keys and values in one tensor, ``[2, L, Hkv, blocks]``."""
        return torch.stack((self.keys, self.values))

    @property
    def coordinates(self) -> Tensor:
        """How many coordinates every head keeps at any number of bits, ``[2, L, Hkv]``: its rank."""
        return ((self.stacked > 0) * block_sizes(self.width)).sum(-1)

    @property
    def bits(self) -> int:
        """Bits stored per token, keys and values of all layers. Codes of a last block are those of a whole one."""
        stacked = self.stacked
        sizes = torch.where(stacked == FULL_BITS, block_sizes(self.width), COORDINATES_PER_BLOCK)
        return int((stacked * sizes).sum())

    @property
    def quantised(self) -> bool:
        """Whether any coordinates are stored at fewer than 16 bits."""
        stacked = self.stacked
        return bool(((stacked > 0) & (stacked < FULL_BITS)).any())

    @property
    def full(self) -> list[bool]:
        """For each layer, whether nothing of it is compressed."""
        return (self.stacked == FULL_BITS).all(3).all(2).all(0).tolist()

    def groups(self, row: int) -> list[tuple[list[int], tuple[tuple[int, ...], tuple[int, ...]]]]:
        """The heads of a layer that have the same bits: (heads, (bits of keys, of values)), most bits first."""
        pairs = [(tuple(k), tuple(v)) for k, v in zip(self.keys[row].tolist(), self.values[row].tolist(), strict=True)]
        return [([h for h, p in enumerate(pairs) if p == pair], pair) for pair in sorted(set(pairs), reverse=True)]

    def token_bytes(self, itemsize: int) -> list[int]:
        """Bytes of the coordinates of a token in each layer: those of 16 bits have ``itemsize`` bytes each, and b bits
        of the eight of a block are b bytes."""
        stacked = self.stacked
        return torch.where(stacked == FULL_BITS, block_sizes(self.width) * itemsize, stacked).sum((0, 2, 3)).tolist()

    def check(self, layers: int, heads: int, width: int) -> None:
        """Raise `BudgetError` unless the table fits ``layers`` x ``heads`` heads of ``width`` coordinates."""
        if self.width != width:
            raise BudgetError(f"allocation: for heads of {self.width} coordinates, expected {width}")
        shape = [layers, heads, len(block_sizes(width))]
        for name, bits in (("keys", self.keys), ("values", self.values)):
            if bits.dtype != torch.int64:
                raise BudgetError(f"allocation: {name} are {bits.dtype}, expected whole numbers, torch.int64")
            if list(bits.shape) != shape:
                raise BudgetError(f"allocation: {name} is {list(bits.shape)}, expected {shape}")
            if wrong := sorted(set(bits.flatten().tolist()) - set(CHOICES)):
                raise BudgetError(f"allocation: {name} holds {wrong[0]} bits, expected some of {CHOICES}")
