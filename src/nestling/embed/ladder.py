"""The sizes of an encoder, in layers and dims, from the smallest to the full model.

A size cuts an encoder twice: only its first ``layers`` layers are run, and only the first ``dims`` coordinates of the
pooled vector are kept. A ladder is the list of sizes that are trained and served together (arXiv 2410.13230); its
largest size is the full model, which teaches the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

from nestling.errors import LadderError
from nestling.files.reading import short

LARGEST = 999_999_999  # layers or dims; what can be written as a size's name
SMALLEST = 32  # dims of the smallest size of a default ladder, as in the paper
FORMAT = 1


@dataclass(frozen=True, order=True)
class Size:
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
    def parse(cls, value: Any) -> Size:
        """A size from ``"6x128"``, ``(6, 128)``, or itself.

        Raises:
            LadderError: for anything else.
        """
        if isinstance(value, Size):
            return value
        if isinstance(value, tuple | list) and len(value) == 2:
            return cls(*value)
        match = (
            re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", value, re.ASCII) if isinstance(value, str) else None
        )
        if match is None:
            raise LadderError(f"{short(value)} is no size: write layers x dims, as in 6x128")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ladder:
    """Distinct sizes, smallest first.

    Args:
        sizes: in any order, in forms that `Size.parse` takes.

    Raises:
        LadderError: no sizes, one of them twice, or one that cannot be.
    """

    sizes: tuple[Size, ...]

    def __init__(self, sizes: Iterable[Any]):
        ordered = sorted(map(Size.parse, sizes))
        if not ordered:
            raise LadderError("a ladder needs at least one size, for instance 2x32,4x64,6x128")
        for one, other in zip(ordered, ordered[1:], strict=False):
            if one == other:
                raise LadderError(f"the size {one} is in the ladder twice: leave one out")
        object.__setattr__(self, "sizes", tuple(ordered))

    @classmethod
    def parse(cls, value: Any) -> Ladder:
        """A ladder from ``"2x32,4x64,12x768"``, from sizes or pairs, or itself.

        Raises:
            LadderError: for anything else, no sizes, or a size that is named twice.
        """
        if isinstance(value, Ladder):
            return value
        if isinstance(value, str):
            value = [word for word in value.split(",") if word.strip()]
        if not isinstance(value, Iterable):
            raise LadderError(f"{short(value)} is no ladder: write it as 2x32,4x64,6x128, or give a list of sizes")
        return cls(value)

    @classmethod
    def default(cls, layers: int, dims: int) -> Ladder:
        """A ladder for a model of that shape: the paper's for 12 x 768, its pattern for others.

        Dims are the full width and every power of two below it down to 32 (an eighth of the width in narrow models);
        layers rise in equal steps. A model with fewer layers than that gets fewer sizes.

        Raises:
            LadderError: unless both are integers from 1 on.
        """
        full = Size(layers, dims)
        floor = min(SMALLEST, max(1, full.dims // 8))
        powers = (1 << bit for bit in range(full.dims.bit_length()))
        widths = [width for width in powers if floor <= width < full.dims] + [full.dims]
        count = min(len(widths), full.layers)
        steps = range(1, count + 1)
        return cls((round(full.layers * i / count), widths[round(len(widths) * i / count) - 1]) for i in steps)

    @property
    def full(self) -> Size:
        """The largest size: the teacher, and the whole model once `check` has passed."""
        return self.sizes[-1]

    @property
    def layers(self) -> tuple[int, ...]:
        """The depths that occur, each once, shallow first."""
        return tuple(sorted({size.layers for size in self.sizes}))

    @property
    def grid(self) -> Ladder:
        """Every depth of the ladder at every width of it."""
        dims = {size.dims for size in self.sizes}
        return Ladder((layers, width) for layers in self.layers for width in dims)

    def named(self, name: Any) -> Size:
        """The size of that name, in a form that `Size.parse` takes.

        Raises:
            LadderError: it is not in the ladder.
        """
        size = Size.parse(name)
        if size not in self.sizes:
            raise LadderError(f"the size {size} is not in the ladder: choose one of {self}")
        return size

    def check(self, layers: int, dims: int) -> Ladder:
        """The ladder itself, if a model of that shape has all of its sizes and is the largest of them.

        Args:
            layers, dims: the model's layers and the width of its embeddings.

        Raises:
            LadderError: a size is deeper or wider than the model, or the full size is missing.
        """
        whole = Size(layers, dims)
        for size in self.sizes:
            for what, asked, there in (("deeper", size.layers, layers), ("wider", size.dims, dims)):
                if asked > there:
                    advice = f"{Ladder.default(layers, dims)} would do"
                    raise LadderError(f"the size {size} is {what} than the model, which is {whole}: {advice}")
        if self.full != whole:
            raise LadderError(f"the full size {whole} is missing: it teaches the others; add it to {self}")
        return self

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, of JSON's own types; kept in ``nestling.json``."""
        return {"format": FORMAT, "cups": [{"layers": size.layers, "dims": size.dims} for size in self.sizes]}

    @classmethod
    def from_json(cls, value: Any) -> Ladder:
        """The ladder that `to_json` described; other keys are left alone.

        Raises:
            LadderError: the value is not of that form, or of a newer one.
        """
        sizes = value.get("cups") if isinstance(value, dict) else None
        if not isinstance(sizes, list) or not all(isinstance(size, dict) for size in sizes):
            raise LadderError('the ladder is damaged: expected {"cups": [{"layers": 2, "dims": 32}, ...]}')
        version = value.get("format", FORMAT)
        if isinstance(version, bool) or version != FORMAT:
            raise LadderError(f"the ladder has format {short(version)}, this version reads {FORMAT}: update nestling")
        return cls(Size(size.get("layers"), size.get("dims")) for size in sizes)

    def __iter__(self) -> Iterator[Size]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __contains__(self, size: object) -> bool:
        return size in self.sizes

    def __str__(self) -> str:
        return ",".join(size.name for size in self.sizes)


def _count(value: Any, name: str) -> int:
    """The integer itself, from 1 on. A bool is none, though Python thinks otherwise."""
    try:
        count = index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise LadderError(f"a size's {name} must be an integer from 1 on, got {short(value)}")
    if count > LARGEST:
        raise LadderError(f"a size's {name} must be at most {LARGEST:,}, got {short(value)}")
    return count
