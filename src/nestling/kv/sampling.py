"""Which ranks a training step sees. A schedule draws a table ``[2, L, Hkv]`` (keys, values) for each text of a batch.

Every draw depends on the seed and the number of the text alone, so that a resumed training, or one on more processes,
sees the same ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.kv.adapter import KVAdapter
from nestling.kv.allocate import STEP

Schedule = Callable[[int], Tensor]
SAMPLINGS = ("path", "sandwich", "independent", "fixed")
LOWEST, HIGHEST = 0.2, 0.875  # shares of the ranks that `path` draws from
GRID = 28  # allocations along the path
JITTER = 0.25  # how often `path` moves a rank by a step, up or down
FIXED = 0.5


def schedule(name: str, adapter: KVAdapter, *, allocation: str = "energy", seed: int = 0) -> Schedule:
    """The draw of ranks by the number of a text.

    * ``path``: a share of the full ranks between `LOWEST` and `HIGHEST`, at what the allocation makes of it, some
      ranks moved by a step. What is trained is what will be used.
    * ``sandwich``: as ``path``, but of every four texts one has the smallest and one the largest share.
    * ``independent``: multiples of D / 8 for each layer, head and side by itself (arXiv 2410.14731).
    * ``fixed``: what the allocation makes of half of the ranks, always: the ablation without sampling.

    Args:
        allocation: of all but ``independent``: ``"energy"`` or ``"uniform"``.

    Raises:
        ValueError: for unknown names.
    """
    layers, heads, width = adapter.shape
    shape = (2, layers, heads)

    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + number)  # its low 32 bits count

    if name == "independent":
        step = max(1, width // 8)
        return lambda number: torch.randint(1, width // step + 1, shape, generator=generator(number)) * step
    if name not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {name!r}")
    if name == "fixed":
        half = adapter.ranks(FIXED * adapter.full_elements, allocation).stacked
        return lambda number: half
    shares = torch.linspace(max(LOWEST, STEP / width), HIGHEST, GRID).tolist()
    tables = [adapter.ranks(share * adapter.full_elements, allocation).stacked for share in shares]

    def draw(number: int) -> Tensor:
        if name == "sandwich" and number % 4 < 2:
            return tables[-(number % 4)]
        rng = generator(number)
        table = tables[int(torch.randint(GRID, (), generator=rng))]
        moves = torch.randint(0, 2, shape, generator=rng) * 2 - 1
        moved = torch.rand(shape, generator=rng) < JITTER
        return (table + moves * moved * STEP).clamp(min(STEP, width), width)

    return draw
