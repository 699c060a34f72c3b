"""Other ways to quantise, simulated at equal allocations: steps chosen for each token, and other values of codes.

    python benchmarks/kv_levels.py --data FOLDER

* ``static``: as in caches, one step and one set of values for all tokens.
* ``token-steps``: of four factors of the step the best for each token, head and side (2 bits, which are not counted),
  by the errors at this very allocation. A cache that was shrunk would then differ from one that was made smaller.
* ``token-steps-fixed``: by the errors at one allocation for all, so that shrinking stays exact.
* ``least-squares``: values with the least error, fitted for each coordinate and width.
* ``unbiased``: values of which E[z read] = E[z^2], likewise.

KL to the full model of a book and of the Brown corpus, 2,048 tokens each, that nothing was fitted to.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from kv_costs import DOCUMENTS, pieces
from rich.console import Console
from torch import Tensor

from nestling import kv
from nestling.data.texts import read_texts
from nestling.data.windows import token_windows
from nestling.kv.adapter_files import SIDES
from nestling.kv.allocation.table import CHOICES, by_coordinate
from nestling.kv.cache.rule import SKIP
from nestling.kv.calibration.costs import Coordinates
from nestling.kv.integration.attach import served
from nestling.kv.quantisation.quantiser import WIDTHS, rounded
from nestling.kv.simulation.student import Student
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

LENGTH, FITTED = 2048, 12  # tokens of a text; texts that values are fitted to
FACTORS = (0.75, 1.0, 1.4, 2.0)
FIXED = 0.15  # share of the bits, by whose allocation steps are chosen
BOOK = slice(300_000, 330_000)  # characters, of one that no adapter was made from
USUAL = 4  # bits by whose costs errors of coordinates are weighed


@dataclass
class Read:
    """Keys and values as they are read; see `nestling.kv.simulation.projections.Masked`.

    Attributes:
        bits: of each coordinate, ``[2, L, Hkv, D]``.
        step, weight: likewise.
        values: factors of what is read, ``[2, L, Hkv, D, 9]`` by width.
        chosen_by: bits by whose errors a token's factor of the step is chosen; None: there is one factor for all.
    """

    coordinates: Coordinates
    bits: Tensor
    step: Tensor
    weight: Tensor
    values: Tensor
    chosen_by: Tensor | None = None

    def __call__(self, states: Tensor, side: int, row: int, positions: Tensor) -> Tensor:
        z = self.coordinates.of(side, row, states)
        dropped = self.coordinates.dropped(side, row, positions)

        def error(bits: Tensor, factor: float) -> Tensor:
            bits, step = bits[side, row, :, None], factor * self.step[side, row, :, None]
            found = torch.zeros_like(z)
            for width in bits.unique().tolist():
                if width in CHOICES[:-1]:
                    read = dropped
                    if width:
                        read = rounded(z, step, width) * self.values[side, row, :, None, :, width]
                    found = torch.where(bits == width, read - z, found)
            return found

        errors = error(self.bits, 1.0)
        if self.chosen_by is not None:
            weight = self.weight[side, row, :, None]
            lost = [(error(self.chosen_by, f).square() * weight).sum(-1) for f in FACTORS]
            best = torch.stack(lost).argmin(0)[..., None]
            for place, factor in enumerate(FACTORS):
                errors = torch.where(best == place, error(self.bits, factor), errors)
        return states + self.coordinates.states(side, row, errors).to(states.dtype)


class Sums:
    """Looks at keys and values, for values of codes: sums over tokens of what is read and of what it stands for."""

    def __init__(self, coordinates: Coordinates, step: Tensor):
        self.coordinates, self.step = coordinates, step
        shape = (2, *coordinates.shape, 1 + len(WIDTHS))
        self.read, self.both, self.power = (torch.zeros(shape) for _ in range(3))

    def __call__(self, side: int, row: int, states: Tensor, cut: Tensor, positions: Tensor) -> None:
        z = self.coordinates.of(side, row, states)[:, :, SKIP:]
        for width in WIDTHS:
            read = rounded(z, self.step[side, row, :, None], width)
            for total, part in ((self.read, read * read), (self.both, read * z), (self.power, z * z)):
                total[side, row, ..., width] += part.sum((0, 2))

    def values(self) -> dict[str, Tensor]:
        known = self.both > 0
        one = torch.ones_like(self.both)
        return {
            "least-squares": torch.where(known, self.both / self.read, one),
            "unbiased": torch.where(known, self.power / self.both, one).clamp(0.5, 2.0),
        }


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("smollm2", help="Alias, folder or hub id."),
    adapter: str = typer.Option("smollm2", help="Folder, hub id or alias."),
    shares: str = typer.Option("0.2,0.1,0.045", help="Of the bits of all coordinates."),
    out: Path = typer.Option(Path("benchmarks/results/kv_levels.json")),
):
    start, rows = time.monotonic(), []
    lm, tokenizer = load_model(model)
    nested = kv.KVAdapter.from_pretrained(adapter)
    book = list(read_texts(str(data / "long/books.jsonl.gz")))[3][BOOK]
    brown = "\n".join(list(read_texts(str(data / "lm/brown.jsonl.gz")))[DOCUMENTS:])
    held_out = [next(iter(token_windows(tokenizer, [text], LENGTH, limit=1))) for text in (book, brown)]
    coordinates = Coordinates(nested, torch.device("cpu"))
    step = torch.stack([nested.step[side] for side in SIDES])
    cost = torch.stack([nested.quantisation_cost[side] for side in SIDES])
    weight = (cost[..., 1 + WIDTHS.index(USUAL)] / step.square()).clamp_min(1e-30)
    with served(lm), torch.no_grad():
        student = Student(lm, nested, sinks=4, window=64).eval()
        sums = Sums(coordinates, step)
        for ids in pieces(data, tokenizer, FITTED, LENGTH):
            student.watched(ids[None], [sums], 0)
        plain, fixed = torch.ones_like(sums.both), by_coordinate(nested.allocate(FIXED).stacked, nested.shape[2])
        for share in map(float, shares.split(",")):
            bits = by_coordinate(nested.allocate(share).stacked, nested.shape[2])
            ways = {"static": (plain, None), "token-steps": (plain, bits), "token-steps-fixed": (plain, fixed)}
            ways |= {name: (values, None) for name, values in sums.values().items()}
            for way, (values, chosen_by) in ways.items():
                read = student.reading(Read(coordinates, bits, step, weight, values, chosen_by))
                kls = [float(student.distance(ids[None], read)) for ids in held_out]
                rows.append({"way": way, "share": share, "kl_book": kls[0], "kl_brown": kls[1], "kl": sum(kls) / 2})
                write_json(out, rows, run_meta(time.monotonic() - start))
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
