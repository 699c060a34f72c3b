"""What a training step sees: texts, and the bits that they are read at.

A schedule draws the bits of each block of coordinates, ``[2, L, Hkv, blocks]`` (keys, values), for each text of a
batch: of a rank, 16 for the first blocks and none for the others.

Every draw depends on the seed and the number of the text alone, so that a resumed training, or one on more processes,
sees the same.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nestling.errors import AdapterError
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.allocate import ENERGY, steps_of
from nestling.kv.allocation.budget import FULL_BITS
from nestling.kv.allocation.table import Allocation, block_sizes, first_blocks
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.training.config import SAMPLINGS
from nestling.options import choice

Schedule = Callable[[int], Tensor]
LOWEST, HIGHEST = 0.2, 0.875  # shares of the ranks that `path` draws from
GRID = 28  # allocations along the path
JITTER = 0.25  # how often `path` moves a rank by a step, up or down
FEWEST_BITS, MOST_BITS = 0.5, 6.0  # an element, on average, that `bits` draws from


def schedule(name: str, adapter: KVAdapter, *, allocation: str = ENERGY, seed: int = 0) -> Schedule:
    """The draw of bits by the number of a text.

    * ``path``: a share of the full ranks between `LOWEST` and `HIGHEST`, at what the allocation makes of it, some
      ranks moved by a block. What is trained is what will be used.
    * ``independent``: multiples of D / 8 for each layer, head and side by itself (arXiv 2410.14731), in whole blocks.
    * ``bits``: of two texts one is read as in ``path``, at 16 bits, and one at the bits that are allotted to some
      number of bits in all, from half a bit an element to six.

    Args:
        allocation: of all but ``independent``: ``"energy"`` or ``"uniform"``.

    Raises:
        OptionError: for unknown names.
        AdapterError: for ``bits`` of an adapter without quantisation costs.
    """
    layers, heads, width = adapter.shape
    shape, blocks = (2, layers, heads), len(block_sizes(width))

    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + number)  # its low 32 bits count

    if name == "independent":
        step = max(1, blocks // 8)

        def draw_independent(number: int) -> Tensor:
            steps = torch.randint(1, blocks // step + 1, shape, generator=generator(number))
            return first_blocks(step * steps, blocks)

        return draw_independent
    choice("sampling", name, SAMPLINGS)
    shares = torch.linspace(max(LOWEST, min(1.0, COORDINATES_PER_BLOCK / width)), HIGHEST, GRID).tolist()
    ranks = (steps_of(adapter, allocation, quantise=False).tables(shares) > 0).sum(-1)  # in blocks

    def draw(number: int) -> Tensor:
        rng = generator(number)
        table = ranks[int(torch.randint(GRID, (), generator=rng))]
        moves = torch.randint(0, 2, shape, generator=rng) * 2 - 1
        moved = torch.rand(shape, generator=rng) < JITTER
        return first_blocks((table + moves * moved).clamp(1, blocks), blocks)

    if name != "bits":
        return draw
    if not adapter.quantises:
        raise AdapterError("this adapter has no quantisation costs and steps: calibrate or train it again")
    spread = torch.linspace(math.log(FEWEST_BITS), math.log(MOST_BITS), GRID).exp() / FULL_BITS
    quantised = steps_of(adapter).tables(spread.tolist())

    def draw_bits(number: int) -> Tensor:
        if number % 2:
            return quantised[int(torch.randint(GRID, (), generator=generator(number)))]
        return draw(number)

    return draw_bits


class RankedWindows(torch.utils.data.Dataset):
    """Texts with the bits they are read at: ``{"input_ids": [T], "bits": [2, L, Hkv, blocks]}``, and ``labels``
    ``[T]`` if there are any; ``count`` of them.

    Passes over the windows ``[n, T]`` follow each other, each in an order of its own.
    """

    def __init__(self, windows: Tensor, bits: Schedule, seed: int, count: int, labels: Tensor | None = None):
        self.windows, self.bits, self.seed, self.count, self.labels = windows, bits, seed, count, labels

    @classmethod
    def fixed(cls, windows: Tensor, allocation: Allocation) -> "RankedWindows":
        """All windows once, at an allocation."""
        return cls(windows, lambda number: allocation.stacked, 0, len(windows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        turn, place = divmod(number, len(self.windows))
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.seed * 1009 + turn))
        item = {"input_ids": self.windows[order[place]], "bits": self.bits(number)}
        return item if self.labels is None else {**item, "labels": self.labels[order[place]]}
