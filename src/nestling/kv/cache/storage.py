"""What the layers of a nested cache are put together from: rank groups, exact stores, and how storage grows."""

from collections.abc import Sequence
from dataclasses import dataclass

from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.bases import LayerBases, Members
from nestling.kv.cache.buffer import room
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.groups import RankGroup
from nestling.kv.cache.packed import Layout
from nestling.kv.cache.rule import coded, exact_nbytes
from nestling.kv.cache.window import TOKENS_PER_BLOCK, Window

States = tuple[int, int, int]  # heads, width, and bytes of a number, of keys as of values


@dataclass(frozen=True, slots=True)
class Storage:
    """What layers are put together from, in tokens.

    Attributes:
        sinks, window, block: exact ones, and how many are encoded at once.
        context: at which a budget has to be met; 0 where there is none.
        rows: whether exact tokens are stored at 8 bits; see `ExactStore`.
    """

    sinks: int = 0
    window: Window = Window()
    block: int = TOKENS_PER_BLOCK
    context: int = 0
    rows: bool = False

    def exact(self, full: bool) -> ExactStore | None:
        """An empty exact store, if a layer has one: there is none where nothing is compressed, at ``full`` ranks."""
        if full or not (self.sinks or self.window):
            return None
        return ExactStore(self.sinks, self.window, self.block, rows=self.rows)

    def exact_nbytes(self, places: int, states: States) -> int:
        """Bytes of an exact store of so many places, of one text."""
        return exact_nbytes(places, self.sinks, *states, self.rows)

    def until(self, full: bool) -> int:
        """Tokens in coordinates at `context`: there is no room for more before they are there."""
        return self.context if full else coded(self.context, self.sinks, self.window, self.block)

    def groups(self, bases: LayerBases, members: Members, present: Sequence[RankGroup] = ()) -> list[RankGroup]:
        """The groups of a layer, empty but for what groups in use hold that stays as it is.

        Args:
            present: groups in use.
        """
        full = is_full(bases.width, members)
        groups: list[RankGroup] = []
        for (heads, pair), sides in zip(members, bases.sides, strict=True):
            start = groups[-1].stop if groups else 0
            same = next((group for group in present if group.heads == heads), None)
            groups.append(RankGroup(heads, start, sides, pair, until=self.until(full), by_token=full, present=same))
        return groups

    def nbytes(
        self,
        tokens: int,
        coordinates: int,
        states: States,
        full: bool,
        stored: int | None = None,
        held: int | None = None,
    ) -> int:
        """Bytes that a layer holds of one text of so many tokens, whichever way they came.

        Args:
            coordinates: bytes of a token's coordinates.
            states: of its keys and values.
            full: whether nothing is compressed.
            stored, held: tokens in coordinates, and all that were not evicted; by default those of a text that was
                only read.
        """
        held, exact = tokens if held is None else held, self.exact(full)
        if exact is None:
            return coordinates * room(held, self.until(full))
        stored = exact.coded(tokens) if stored is None else stored
        places = exact.places(tokens, tokens - (held - stored), stored)
        return coordinates * room(stored, self.until(full)) + self.exact_nbytes(places, states)


def is_full(width: int, members: Members) -> bool:
    """Whether nothing of a layer is compressed."""
    return all(len(layout.plain) == width for _, pair in members for layout in pair)


def members(allocation: Allocation, row: int) -> Members:
    """Heads of a layer that are stored alike, and how; by their first heads, most often the model's order."""
    groups, width = sorted(allocation.groups(row)), allocation.width
    return [(heads, (Layout.of(keys, width), Layout.of(values, width))) for heads, (keys, values) in groups]
