"""How many recent tokens a cache keeps exact, at least: by default as many as take three tenths of its budget.

That is near the best for SmolLM2 at 2,048 tokens and budgets from 6 to 25 %: at 12.5 % with half as many its KL is a
quarter larger, with half as many again more than twice as large (``benchmarks/kv_bits.py --window``). Up to the
context that a cache is made for, their number is the one at the context. Beyond it there are more of them the longer
the text is, so that a cache takes the same share of the full one.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TOKENS_PER_BLOCK = 16  # recent tokens that are encoded at once, when the store is full
LEAST = 8  # recent tokens, in a text of any length
EXACT_SHARE = 0.3  # of the bytes of a budget, for exact tokens
LARGEST = 0.4  # budget that has more of them than smaller ones: layers that lose nothing have none, and save none


@dataclass(frozen=True, slots=True)
class Window:
    """How many recent tokens are exact, at least.

    Attributes:
        least: in a text of any length.
        share: of the tokens of a text.
        less: by so many fewer than the share, for sinks and for free places.
    """

    least: int = 0
    share: float = 0.0
    less: int = 0

    @classmethod
    def of_budget(cls, budget: float, context: int, sinks: int, rows: bool) -> "Window":
        """For a share of the full cache.

        Args:
            context: tokens of a text at which the budget is met.
            rows: whether exact tokens take 8 bits a number, sinks twice as many, and not 16.
        """
        share = EXACT_SHARE * min(budget, LARGEST) * (1 + rows)
        less = sinks + sinks * rows + TOKENS_PER_BLOCK - 1
        return cls(max(int(share * context) - less, LEAST), share, less)

    def at(self, length: Any) -> Any:
        """In a text of ``length`` tokens, an int or a tensor of them. It grows by one at most where that does."""
        if isinstance(length, Tensor):
            return ((self.share * length.double()).long() - self.less).clamp_min(self.least)
        return int(self.real(length))

    def real(self, length: int) -> float:
        """The same for a text of ``length`` tokens, without rounding."""
        return max(self.share * length - self.less, self.least)

    @property
    def steady(self) -> float:
        """The length of a text up to which it does not grow."""
        return (self.least + self.less) / self.share if self.share else math.inf

    def __bool__(self) -> bool:
        return bool(self.least or self.share)
