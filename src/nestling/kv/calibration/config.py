"""Options of calibration and of the search of allocations. torch is not imported: commands show them quickly."""

from dataclasses import dataclass
from functools import partial

from nestling.config import Config, option
from nestling.kv.allocation.budget import SINKS, WINDOW
from nestling.options import choice, natural, number, whole

BASES = ("balanced", "pca")  # for queries and outputs, and the paper's
AUTO = "auto"  # of both the better one for each layer and side
METHODS = ("blend", "greedy")
PIECES, LENGTH = 12, 2048  # texts on which quantisation costs are measured, and their tokens
DROP_PIECES, DROP_LENGTH = 16, 512  # those for drop costs
CORRECTION_PIECES = 4  # of `LENGTH`, on which small caches are tried
CONTEXT = 8192  # tokens of the longest texts that bases are made for by default


@dataclass(frozen=True, kw_only=True)
class FitConfig(Config):
    """How `nestling.kv.fit` calibrates.

    Exact tokens are those that the caches will keep: what is read from them costs nothing. They are 0 and 0 for
    caches that compress everything.
    """

    basis: str = option(
        AUTO,
        "balanced, pca (the paper's), or auto: for the keys and the values of each layer the better one, as measured.",
        partial(choice, known=(AUTO, *BASES)),
    )
    tokens: int = option(65536, "Tokens to calibrate on; all of the text if it is shorter.", whole)
    length: int = option(1024, "Tokens per window: bases fit the positions that were seen.", whole)
    batch_tokens: int = option(4096, "Tokens per forward pass.", whole, cli=False)
    context: int = option(
        None,
        f"Tokens of the longest texts that caches will hold; by default {CONTEXT}, or what the model reads if less.",
        whole,
        cli=int | None,
    )
    pieces: int = option(PIECES, "Pieces of text on which quantisation costs are measured.", whole, cli=False)
    piece_length: int = option(LENGTH, "Tokens per piece.", whole, cli=False)
    sensitivity_windows: int = option(DROP_PIECES, "Pieces of text for drop costs.", whole, cli=False)
    sensitivity_length: int = option(DROP_LENGTH, "Tokens per piece.", whole, cli=False)
    correction_pieces: int = option(CORRECTION_PIECES, "Pieces on which small caches are tried.", whole, cli=False)
    minutes: float | None = option(
        None,
        "Minutes that it may take, about: less text is read where all of it would take longer.",
        partial(number, above=0),
    )
    sinks: int = option(SINKS, "Leading tokens that the caches will keep exact.", natural)
    window: int = option(WINDOW, "Recent tokens that they will keep exact, at least.", natural)
    seed: int = option(0, "Seed of the labels that the model draws.", partial(whole, minimum=0, maximum=2**32 - 1))


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """How `nestling.kv.search` measures."""

    method: str = option(
        "blend", "blend (quick), or greedy (Algorithm 1 of the paper).", partial(choice, known=METHODS)
    )
    windows: int = option(4, "Texts to measure on.", whole)
    length: int = option(512, "Tokens per text.", whole)
    sinks: int = option(SINKS, "Leading tokens that the caches will keep exact.", natural)
    window: int = option(WINDOW, "Recent tokens that they will keep exact, at least.", natural)
    per_sweep: int = option(16, "Ranks that greedy lowers at a time; 1 is the paper's.", whole, cli=False)
    lowest: float = option(
        0.2,
        "Share of the ranks at which greedy stops; below, it goes by the drop costs.",
        partial(number, minimum=0, below=1),
        cli=False,
    )
