"""The sizes of an encoder: cups of (layers, dims), from the smallest to the full model.

A cup cuts an encoder twice: only its first ``layers`` layers are run, and only the first ``dims`` coordinates of the
pooled vector are kept. A ladder is the list of cups that are trained and served together (arXiv 2410.13230); its
largest cup is the full model, which teaches the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

from nestling.errors import LadderError
from nestling.files.reading import short

LARGEST = 999_999_999  # layers or dims; what can be written as a cup's name
SMALLEST = 32  # dims of the smallest cup of a default ladder, as in the paper
FORMAT = 1
LABELS = {
    "Demi": (2, 32), "Short": (4, 64), "Tall": (6, 128), "Grande": (8, 256), "Venti": (10, 512), "Trenta": (12, 768),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Cup:
    """One size: the first ``layers`` layers and the first ``dims`` coordinates. Ordered by layers, then by dims.

    Raises:
        LadderError: unless both are integers from 1 on.
    """

    layers: int
    dims: int

    def __post_init__(self):
        for name in ("layers", "dims"):
            object.__setattr__(self, name, _count(getattr(self, name), name))

    @property
    def name(self) -> str:
        """As it is written in ladders, tables and logs: ``"6x128"``."""
        return f"{self.layers}x{self.dims}"

    @property
    def label(self) -> str:
        """The paper's name of its six cups (``"Demi"`` to ``"Trenta"``), else `name`."""
        return next((label for label, size in LABELS.items() if size == (self.layers, self.dims)), self.name)

    @classmethod
    def parse(cls, text: str) -> Cup:
        """A cup from ``"6x128"`` or from one of the paper's names, in any case.

        Raises:
            LadderError: for anything else.
        """
        if not isinstance(text, str):
            raise LadderError(f"{short(text)} is no cup: write layers x dims, as in 6x128")
        word = text.strip().lower() if len(text) <= 100 else ""
        for label, size in LABELS.items():
            if word == label.lower():
                return cls(*size)
        if not (found := re.fullmatch(r"(\d{1,9})\s*[x×]\s*(\d{1,9})", word, re.ASCII)):
            names = ", ".join(LABELS)
            raise LadderError(f"{short(text)} is no cup: write layers x dims, as in 6x128, or one of {names}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ladder:
    """Distinct cups, smallest first.

    Args:
        cups: in any order; pairs ``(layers, dims)`` will do.

    Raises:
        LadderError: no cups, one of them twice, or one that cannot be.
    """

    cups: tuple[Cup, ...]

    def __init__(self, cups: Iterable[Cup | tuple[int, int]]):
        found = sorted(cup if isinstance(cup, Cup) else Cup(*_pair(cup)) for cup in cups)
        if not found:
            raise LadderError("a ladder needs at least one cup, for instance 2x32,4x64,6x128")
        for one, other in zip(found, found[1:], strict=False):
            if one == other:
                raise LadderError(f"the cup {one} is in the ladder twice: leave one out")
        object.__setattr__(self, "cups", tuple(found))

    @classmethod
    def parse(cls, text: str | Ladder | Iterable[Any]) -> Ladder:
        """A ladder from ``"2x32,4x64,12x768"``, names (``"demi,short,trenta"``), or a list of cups in any form.

        Raises:
            LadderError: for text that is no ladder, no cups, or a cup that is named twice.
        """
        if isinstance(text, Ladder):
            return text
        if isinstance(text, str):
            words = [word for word in text.split(",") if word.strip()]
            return cls([Cup.parse(word) for word in words])
        if not isinstance(text, Iterable):
            raise LadderError(f"{short(text)} is no ladder: write it as 2x32,4x64,6x128, or give a list of cups")
        return cls([Cup.parse(item) if isinstance(item, str) else item for item in text])

    @classmethod
    def default(cls, layers: int, dims: int) -> Ladder:
        """A ladder for a model of that shape: the paper's for 12 x 768, its pattern for others.

        Dims are the full width and every power of two below it down to 32 (an eighth of the width in narrow models);
        layers rise in equal steps. A model with fewer layers than that gets fewer cups.

        Raises:
            LadderError: unless both are integers from 1 on.
        """
        full = Cup(layers, dims)
        floor = min(SMALLEST, max(1, full.dims // 8))
        powers = (1 << bit for bit in range(full.dims.bit_length()))
        widths = [width for width in powers if floor <= width < full.dims] + [full.dims]
        count = min(len(widths), full.layers)
        steps = range(1, count + 1)
        return cls((round(full.layers * i / count), widths[round(len(widths) * i / count) - 1]) for i in steps)

    @property
    def full(self) -> Cup:
        """The largest cup: the teacher, and the whole model once `check` has passed."""
        return self.cups[-1]

    @property
    def layers(self) -> tuple[int, ...]:
        """The depths that occur, each once, shallow first."""
        return tuple(sorted({cup.layers for cup in self.cups}))

    def cup(self, name: str | Cup) -> Cup:
        """The cup of that name.

        Raises:
            LadderError: it is not in the ladder.
        """
        wanted = name if isinstance(name, Cup) else Cup.parse(name)
        if wanted not in self.cups:
            raise LadderError(f"the cup {wanted} is not in the ladder: choose one of {self}")
        return wanted

    def check(self, layers: int, dims: int) -> Ladder:
        """The ladder itself, if a model of that shape has all of its cups and is the largest of them.

        Args:
            layers, dims: the model's layers and the width of its embeddings.

        Raises:
            LadderError: a cup is deeper or wider than the model, or the full cup is missing.
        """
        whole = Cup(layers, dims)
        for cup in self.cups:
            for what, asked, there in (("deeper", cup.layers, layers), ("wider", cup.dims, dims)):
                if asked > there:
                    advice = f"{Ladder.default(layers, dims)} would do"
                    raise LadderError(f"the cup {cup} is {what} than the model, which is {whole}: {advice}")
        if self.full != whole:
            raise LadderError(f"the full cup {whole} is missing: it teaches the others; add it to {self}")
        return self

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, of JSON's own types; kept in ``nestling.json``."""
        return {"format": FORMAT, "cups": [{"layers": cup.layers, "dims": cup.dims} for cup in self.cups]}

    @classmethod
    def from_json(cls, value: Any) -> Ladder:
        """The ladder that `to_json` described; other keys are left alone.

        Raises:
            LadderError: the value is not of that form, or of a newer one.
        """
        cups = value.get("cups") if isinstance(value, dict) else None
        if not isinstance(cups, list) or not all(isinstance(cup, dict) for cup in cups):
            raise LadderError('the ladder is damaged: expected {"cups": [{"layers": 2, "dims": 32}, ...]}')
        found = value.get("format", FORMAT)
        if isinstance(found, bool) or found != FORMAT:
            raise LadderError(f"the ladder has format {short(found)}, this version reads {FORMAT}: update nestling")
        return cls(Cup(cup.get("layers"), cup.get("dims")) for cup in cups)

    def __iter__(self) -> Iterator[Cup]:
        return iter(self.cups)

    def __len__(self) -> int:
        return len(self.cups)

    def __contains__(self, cup: object) -> bool:
        return cup in self.cups

    def __str__(self) -> str:
        return ",".join(cup.name for cup in self.cups)


def _count(value: Any, name: str) -> int:
    """The integer itself, from 1 on. A bool is none, though Python thinks otherwise."""
    try:
        count = index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise LadderError(f"a cup's {name} must be an integer from 1 on, got {short(value)}")
    if count > LARGEST:
        raise LadderError(f"a cup's {name} must be at most {LARGEST:,}, got {short(value)}")
    return count


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise LadderError(f"{short(value)} is no cup: expected (layers, dims), as in (6, 128)")
    return value[0], value[1]
