"""What a training step sees: texts, and the ranks that they are read at.

A schedule draws a table ``[2, L, Hkv]`` (keys, values) for each text of a batch, or one of the bits of each block of
coordinates, ``[2, L, Hkv, blocks]``.

Every draw depends on the seed and the number of the text alone, so that a resumed training, or one on more processes,
sees the same ranks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.ranks import STEP, RankTable
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.training.config import SAMPLINGS
from nestling.options import choice

Schedule = Callable[[int], Tensor]
LOWEST, HIGHEST = 0.2, 0.875  # shares of the ranks that `path` draws from
GRID = 28  # allocations along the path
JITTER = 0.25  # how often `path` moves a rank by a step, up or down
FEWEST_BITS, MOST_BITS = 0.5, 6.0  # an element, on average, that `bits` draws from


def schedule(name: str, adapter: KVAdapter, *, allocation: str = "energy", seed: int = 0) -> Schedule:
    """The draw of ranks by the number of a text.

    * ``path``: a share of the full ranks between `LOWEST` and `HIGHEST`, at what the allocation makes of it, some
      ranks moved by a step. What is trained is what will be used.
    * ``independent``: multiples of D / 8 for each layer, head and side by itself (arXiv 2410.14731).
    * ``bits``: of two texts one is read as in ``path``, at 16 bits, and one at the bits that are allotted to some
      number of bits in all, from half a bit an element to six.

    Args:
        allocation: of all but ``independent``: ``"energy"`` or ``"uniform"``.

    Raises:
        OptionError: for unknown names.
        AdapterError: for ``bits`` of an adapter without quantisation costs.
    """
    layers, heads, width = adapter.shape
    shape = (2, layers, heads)

    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + number)  # its low 32 bits count

    if name == "independent":
        step = max(1, width // 8)
        return lambda number: torch.randint(1, width // step + 1, shape, generator=generator(number)) * step
    choice("sampling", name, SAMPLINGS)
    shares = torch.linspace(max(LOWEST, STEP / width), HIGHEST, GRID).tolist()
    tables = [adapter.ranks(share * adapter.full_elements, allocation).stacked for share in shares]

    def draw(number: int) -> Tensor:
        rng = generator(number)
        table = tables[int(torch.randint(GRID, (), generator=rng))]
        moves = torch.randint(0, 2, shape, generator=rng) * 2 - 1
        moved = torch.rand(shape, generator=rng) < JITTER
        return (table + moves * moved * STEP).clamp(min(STEP, width), width)

    if name != "bits":
        return draw
    spread = torch.linspace(math.log(FEWEST_BITS), math.log(MOST_BITS), GRID).exp().tolist()
    quantised = [adapter.bits(bits * adapter.full_elements).stacked for bits in spread]

    def draw_bits(number: int) -> Tensor:
        if number % 2:
            return quantised[int(torch.randint(GRID, (), generator=generator(number)))]
        return bits_of_ranks(draw(number), width)

    return draw_bits


def bits_of_ranks(ranks: Tensor, width: int) -> Tensor:
    """16 bits for each block of coordinates that ranks ``[..., Hkv]`` reach: ``[..., Hkv, blocks]``."""
    return 16 * (torch.arange(0, width, COORDINATES_PER_BLOCK) < ranks[..., None])


class RankedWindows(torch.utils.data.Dataset):
    """Texts with the ranks they are read at: ``{"input_ids": [T], "ranks": [2, L, Hkv]}`` (or bits, with an axis of
    blocks more), and ``labels`` ``[T]`` if there are any; ``count`` of them.

    Passes over the windows ``[n, T]`` follow each other, each in an order of its own.
    """

    def __init__(self, windows: Tensor, ranks: Schedule, seed: int, count: int, labels: Tensor | None = None):
        self.windows, self.ranks, self.seed, self.count, self.labels = windows, ranks, seed, count, labels

    @classmethod
    def fixed(cls, windows: Tensor, table: RankTable | BitTable) -> "RankedWindows":
        """All windows once, at the ranks or bits of a table."""
        return cls(windows, lambda number: table.stacked, 0, len(windows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        turn, place = divmod(number, len(self.windows))
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.seed * 1009 + turn))
        item = {"input_ids": self.windows[order[place]], "ranks": self.ranks(number)}
        return item if self.labels is None else {**item, "labels": self.labels[order[place]]}
