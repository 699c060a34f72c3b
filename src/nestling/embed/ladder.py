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

    @classmethod
    def parse(cls, value: Any) -> Cup:
        """A cup from ``"6x128"``, ``(6, 128)``, or itself.

        Raises:
            LadderError: for anything else.
        """
        if isinstance(value, Cup):
            return value
        if isinstance(value, tuple | list) and len(value) == 2:
            return cls(*value)
        match = (
            re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", value, re.ASCII) if isinstance(value, str) else None
        )
        if match is None:
            raise LadderError(f"{short(value)} is no cup: write layers x dims, as in 6x128")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ladder:
    """Distinct cups, smallest first.

    Args:
        cups: in any order, in forms that `Cup.parse` takes.

    Raises:
        LadderError: no cups, one of them twice, or one that cannot be.
    """

    cups: tuple[Cup, ...]

    def __init__(self, cups: Iterable[Any]):
        ordered = sorted(map(Cup.parse, cups))
        if not ordered:
            raise LadderError("a ladder needs at least one cup, for instance 2x32,4x64,6x128")
        for one, other in zip(ordered, ordered[1:], strict=False):
            if one == other:
                raise LadderError(f"the cup {one} is in the ladder twice: leave one out")
        object.__setattr__(self, "cups", tuple(ordered))

    @classmethod
    def parse(cls, value: Any) -> Ladder:
        """A ladder from ``"2x32,4x64,12x768"``, from cups or pairs, or itself.

        Raises:
            LadderError: for anything else, no cups, or a cup that is named twice.
        """
        if isinstance(value, Ladder):
            return value
        if isinstance(value, str):
            value = [word for word in value.split(",") if word.strip()]
        if not isinstance(value, Iterable):
            raise LadderError(f"{short(value)} is no ladder: write it as 2x32,4x64,6x128, or give a list of cups")
        return cls(value)

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

    @property
    def grid(self) -> Ladder:
        """Every depth of the ladder at every width of it."""
        dims = {cup.dims for cup in self.cups}
        return Ladder((layers, width) for layers in self.layers for width in dims)

    def cup(self, name: Any) -> Cup:
        """The cup of that name, in a form that `Cup.parse` takes.

        Raises:
            LadderError: it is not in the ladder.
        """
        cup = Cup.parse(name)
        if cup not in self.cups:
            raise LadderError(f"the cup {cup} is not in the ladder: choose one of {self}")
        return cup

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
        version = value.get("format", FORMAT)
        if isinstance(version, bool) or version != FORMAT:
            raise LadderError(f"the ladder has format {short(version)}, this version reads {FORMAT}: update nestling")
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
