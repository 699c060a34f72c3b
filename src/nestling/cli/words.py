"""The words of ``--help``: what each option takes, and what the terms in its texts mean."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from typer.core import TyperArgument, TyperCommand, TyperGroup

BY_TYPE = {int: "N", float: "NUMBER", str: "NAME", Path: "PATH"}
BY_NAME = {
    "FILE": "text eval_text pairs scored sts task exclude json html png plan results",
    "FOLDER": "retrieval vectors keep",
    "TEXT": "prompt query",
    "MODEL": "model encoder teacher",
    "SIZES": "sizes",
    "SIZE": "size query_size",
    "SIZE=N": "weight",
    "COLUMNS": "columns",
    "BUDGET": "budget",
    "BUDGETS": "budgets",
    "BYTES": "limit",
    "ADAPTER": "adapter",
    "ADDRESS": "host",
}
TAKES = {name: word for word, names in BY_NAME.items() for name in names.split()}

# A term as it stands in texts of ``--help`` (a regular expression): what is said of it below the options.
KV_TERMS = {
    "budgets?": "A BUDGET is a share of the full cache's bytes (0.5, 50, 50% or 8bits, of the 16 that a number has "
    "there), or a limit such as 64MiB.",
    "--sinks|--window": "SINKS and WINDOW are the first and the last tokens, which stay exact.",
    "adapter|bases|coordinates?": "An ADAPTER holds the BASES that keys and values are stored in: axes, the most "
    "valuable first; numbers along them are COORDINATES.",
    "ranks?": "A RANK is how many coordinates of each key or value a head keeps.",
    "allocation": "An ALLOCATION shares a budget out among layers and heads: energy by what leaving coordinates out "
    "was measured to cost, uniform alike, layer with one rank a layer.",
    "KL": "KL is how far the predictions are from those of the full cache, in nats per token.",
    "top-1": "TOP-1 agreement is how often both cache and full cache find the same token likeliest.",
    "passkey": "A PASSKEY is a number in a long text, which is asked for at its end.",
}
EMBED_TERMS = {
    "sizes?": "A SIZE, such as 2x64, is an encoder's first 2 layers and 64 numbers for each text.",
    "projections?|aligned": "A PROJECTION is a matrix that turns what a layer says into the numbers of a size; it is "
    "ALIGNED where it was fitted to the full model's vectors, without training.",
    "sts": "STS sets are pairs of sentences with scores of how alike they are; measured is how well similarities rank "
    "them (Spearman's correlation).",
    "retrieval": "RETRIEVAL sets are queries, documents and judgements; measured is nDCG@10.",
    "agreement": "AGREEMENT is how well similarities of a small size rank pairs as those of the full size do.",
    "prefix": "A PREFIX is the first numbers of a vector; RECALL is the share of the exact results that is found.",
}


class _InWords:
    """A command whose ``--help`` says what options take by words of ours, in place of Python's types."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, with such words."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if isinstance(param, TyperArgument):
                param.display_type_rich = lambda ctx: ""  # type: ignore[method-assign]
            else:
                param.metavar = _word(param)
        return params


class WordedGroup(_InWords, TyperGroup):
    """A group of commands."""


class WordedCommand(_InWords, TyperCommand):
    """A command, whose ``--help`` ends with those of its wing's ``terms`` that occur in it, and examples."""

    terms: Mapping[str, str] = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        texts = " ".join([self.help or "", *(f"--{p.name} {getattr(p, 'help', '')}" for p in self.params)])
        self.epilog = "\n\n".join(filter(None, [defined(texts, self.terms), self.epilog]))


class CacheCommand(WordedCommand):
    """A command of the cache wing."""

    terms = KV_TERMS


class EncoderCommand(WordedCommand):
    """A command of the embedding wing."""

    terms = EMBED_TERMS


def defined(texts: str, terms: Mapping[str, str]) -> str:
    """Sentences on those terms that occur in texts, "" if none does."""
    said = [what for term, what in terms.items() if re.search(rf"(?<!\w)(?:{term})(?!\w)", texts, re.IGNORECASE)]
    return f"Words: {' '.join(said)}" if said else ""


def _word(option: Any) -> str:
    """What an option takes, "" for a flag."""
    if option.is_flag:
        return ""
    kind = option.type_descriptor.annotation
    (kind,) = get_args(kind) or (kind,)
    return TAKES.get(option.name) or BY_TYPE.get(kind, "VALUE")
