"""How many tokens of a text are exact: the rule of the store, by which costs are measured and bases trained too."""

from typing import Any

from nestling.errors import OptionError
from nestling.kv.cache.window import TOKENS_PER_BLOCK, Window
from nestling.kv.quantisation.rows import row_bytes

SKIP = 4  # positions left out of all statistics: attention sinks have outlier keys, and caches keep them exact
SHORT = 4  # in texts shorter than so many full stores, free places would be much of all bytes
GROWTH = 128  # tokens of a text for which a store that grows with it has room


def capacity(sinks: int, window: Window | int, length: int = 0, block: int = TOKENS_PER_BLOCK) -> int:
    """Tokens that a layer's exact store has room for in a text of that ``length``: they are paid for out of the
    budget."""
    return int(places(sinks, window if isinstance(window, Window) else Window(window), length, block))


def places(sinks: int, window: Window, length: int, block: int = TOKENS_PER_BLOCK) -> float:
    """The same, without rounding."""
    return sinks + (window.real(-(-length // GROWTH) * GROWTH) + block - 1 if window else 0)


def check_length(length: int, sinks: int, window: int) -> None:
    """Raise `OptionError` unless texts of ``length`` tokens have some that are not exact."""
    if length <= (exact := capacity(sinks, window)):
        raise OptionError(
            f"length={length} must be longer than the {exact} exact tokens (sinks={sinks}, window={window}): "
            "nothing is compressed"
        )


def coded(length, sinks: int, window: Window | int, block: int = TOKENS_PER_BLOCK):
    """How many of ``length`` tokens (an int, or a tensor of them) are not exact any more: the rule of the store.

    It is also the rule of what a query sees: the token at position p sees ``coded(p + 1)`` tokens compressed, however
    the text is cut into calls.
    """
    block = block if window else 1
    left = length - sinks - (window.at(length) if isinstance(window, Window) else window)
    return left * (left > 0) // block * block


def exact_nbytes(size: Any, sinks: int, heads: int, width: int, itemsize: int, rows: bool) -> Any:
    """Bytes of a store of so many places for keys and values of ``heads`` of ``width``; see `ExactStore`."""
    vectors = size + min(sinks, size)  # where tokens are fewer than sinks, there are no more places
    return 2 * heads * (vectors * row_bytes(width) if rows else size * width * itemsize)
