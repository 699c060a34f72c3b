"""Whole-word masking at two ratios (SMAE, arXiv 2410.13230; after RetroMAE, arXiv 2205.12035), on numpy arrays.

Words are what a tokenizer says they are. One shuffled list of a text's words fills both budgets, the encoder's first.
So what the encoder does not see, the decoder does not see either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nestling.errors import MaskingError

HIDDEN, REPLACED = 0.8, 0.1  # of the masked tokens: by the mask token, by any token; the others stay (BERT)
FEWEST = 2  # words of a text: one to be masked and one to be seen


class Window(NamedTuple):
    """A text, or a piece of one: token ids ``[T]``, and the word that each belongs to, from 0 on, -1 for none."""

    ids: np.ndarray
    words: np.ndarray


class Masked(NamedTuple):
    """Ids as each side sees them ``[T]``, and which of them are masked ``[T]`` bool."""

    encoder_ids: np.ndarray
    encoder_mask: np.ndarray
    decoder_ids: np.ndarray
    decoder_mask: np.ndarray


@dataclass(frozen=True)
class Masking:
    """How texts are masked.

    Attributes:
        mask_id: the token in the place of most masked ones.
        ordinary: ids that a masked token may be replaced by, ``[V']``: all but the special ones.
        encoder, decoder: shares of the tokens that can be masked.

    Raises:
        MaskingError: the shares are not in that order, from above 0 to below 1.
    """

    mask_id: int
    ordinary: np.ndarray
    encoder: float = 0.2
    decoder: float = 0.4

    def __post_init__(self):
        if not 0 < self.encoder <= self.decoder < 1:
            raise MaskingError(
                f"encoder_ratio={self.encoder:g} and decoder_ratio={self.decoder:g}: expected 0 < encoder_ratio <= "
                "decoder_ratio < 1"
            )

    def __call__(self, window: Window, rng: np.random.Generator) -> Masked:
        """A text as both sides see it: of two words or more, one is always left to be seen."""
        sizes = np.bincount(window.words[window.words >= 0])
        order = rng.permutation(len(sizes))
        total = int(sizes.sum())
        budget, both_budget = (min(round(ratio * total), total - 1) for ratio in (self.encoder, self.decoder))
        first = chosen(order, sizes, budget)
        rest = order[~np.isin(order, first)]
        left = both_budget - int(sizes[first].sum())
        both = np.concatenate((first, chosen(rest, sizes, left, at_least=0)))
        encoder, decoder = np.isin(window.words, first), np.isin(window.words, both)
        return Masked(self._replaced(window.ids, encoder, rng), encoder,
                      self._replaced(window.ids, decoder, rng), decoder)  # fmt: skip

    def _replaced(self, ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draw, other = rng.random(len(ids)), rng.choice(self.ordinary, len(ids))
        found = np.where(mask & (draw < HIDDEN), self.mask_id, ids)
        return np.where(mask & (draw >= HIDDEN) & (draw < HIDDEN + REPLACED), other, found)


def chosen(order: np.ndarray, sizes: np.ndarray, budget: int, at_least: int = 1) -> np.ndarray:
    """The words of a list, first ones first, that fit into a budget of tokens; words that do not fit are passed over.

    Args:
        order: numbers of words.
        sizes: tokens of each word, by number.
        at_least: so many are taken from the start of the list even if they do not fit.
    """
    taken, used = [], 0
    for place, word in enumerate(order):
        if place < at_least or used + sizes[word] <= budget:
            taken.append(word)
            used += int(sizes[word])
        if used >= budget and len(taken) >= at_least:
            break
    return np.array(taken, dtype=order.dtype)
