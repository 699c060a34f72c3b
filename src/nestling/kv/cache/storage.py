"""What the layers of a nested cache are put together from: rank groups, exact stores, and how storage grows."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.ranks import RankTable
from nestling.kv.cache.exact import BLOCK, ExactStore
from nestling.kv.cache.groups import RankGroup, shared_biases
from nestling.kv.cache.packed import Layout

CHUNK = 256  # tokens by which storage grows

Table = RankTable | BitTable
Members = list[tuple[list[int], tuple[Layout, Layout]]]  # heads that are stored alike, and how keys and values are


@dataclass(frozen=True, slots=True)
class Storage:
    """What layers are put together from: exact tokens, blocks in which they are encoded, and growth, all in tokens."""

    sinks: int = 0
    window: int = 0
    block: int = BLOCK
    chunk: int = CHUNK

    def exact(self, full: bool) -> ExactStore | None:
        """An empty exact store, if a layer has one: there is none where nothing is compressed, at ``full`` ranks."""
        return ExactStore(self.sinks, self.window, self.block) if (self.sinks or self.window) and not full else None

    def parts(
        self, bases: dict[str, Tensor], members: Members, present: Sequence[RankGroup] = ()
    ) -> tuple[list[RankGroup], ExactStore | None, list[Tensor | None]]:
        """Groups, exact store and biases of a layer: all empty, but for what groups in use hold that stays as it is.

        Args:
            bases: of the layer, see `RankGroup`.
            present: groups in use.
        """
        width = bases["key_encode"].shape[-1]
        full = all(len(layout.plain) == width for _, pair in members for layout in pair)
        groups: list[RankGroup] = []
        for heads, pair in members:
            start = groups[-1].stop if groups else 0
            same = next((group for group in present if group.heads == heads), None)
            groups.append(RankGroup(heads, start, bases, pair, self.chunk, full, same))
        return groups, self.exact(full), shared_biases(groups, bases)


def members(table: Table, row: int, width: int) -> Members:
    """Heads of a layer that are stored alike, and how; by their first heads, most often the model's order."""
    if isinstance(table, RankTable):
        return [(heads, (Layout.of_rank(k), Layout.of_rank(v))) for heads, (k, v) in sorted(table.groups(row))]
    return [(h, (Layout.of_bits(k, width), Layout.of_bits(v, width))) for h, (k, v) in sorted(table.groups(row))]
