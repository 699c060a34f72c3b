"""Early exit against fixed sizes at equal mean cost: what a perfect judge of texts could gain, and what a head does.

    python benchmarks/elastic_exit.py --data FOLDER --texts texts.txt --work FOLDER [--adapter minilm]

Each text leaves at the first depth whose vector is within a tolerance of the full one (1 - cosine). ``oracle`` knows
the true distances, and at once which texts want the full model; ``oracle-best`` chooses each text's depth by the least
distance for the cost of all. ``head`` predicts each depth's distance from its vector, by ridge regressions that are
fitted to other texts. A text that leaves at no small depth takes the full model's layers from the start, since these
are other layers than the small sizes'; ``head-small`` has it leave at the last small depth instead. Costs are layers
that tokens pass, nothing else: neither heads nor regrouped batches are counted, so what is shown is an upper bound. A
row's ``over`` is its gain over the fixed sizes, mixed in proportion, at that cost. Queries leave early like documents,
or are all full.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import typer
from elastic_vectors import FITTED, Source, Vectors
from embed_data import RETRIEVAL, held_out_sets
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from nestling.data.retrieval import read_retrieval
from nestling.embed import GridEvaluator
from nestling.embed.evaluation.metrics import ranking, spearman
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SMALL, FULL, LAST = (1, 2, 3, 4), 6, 4  # depths, and the place of the full one among all
COSTS = torch.tensor([1.0, 2, 3, 4, 6])  # layers of each choice
KINDS = ("sts", "ndcg", "ndcg of full queries")
SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)  # quantiles of distances that are tolerated
LEAST = 1e-4  # of a distance whose logarithm is taken
RIDGE = 1e-2  # of heads, in mean variances


class Group:
    """Texts with their vectors of all sizes in one space, and how far those are off the full ones."""

    def __init__(self, vectors: Vectors, source: Source):
        turns, self.tokens = source.adapter.projections, vectors.tokens.double()
        every = [*((turns[depth], vectors.small[depth]) for depth in SMALL), (turns[FULL], vectors.full)]
        with torch.no_grad():
            self.unit = torch.stack([normalize(turn(raw), dim=-1) for turn, raw in every])  # [5, n, D]
        self.off = 1 - (self.unit * self.unit[-1]).sum(-1)  # [5, n]
        self.off[-1] = 0
        self.features = [self._features(vectors, place) for place in range(len(SMALL))]

    def _features(self, vectors: Vectors, place: int) -> Tensor:
        """What a head reads at a depth ``[n, F]``: the vector, its squares, how far it moved, and the length."""
        unit, raw = self.unit[place], vectors.small[SMALL[place]]
        moved = 1 - (unit * self.unit[max(0, place - 1)]).sum(-1, keepdim=True)
        length = self.tokens[:, None].log().float()
        return torch.cat((raw, unit, unit.square(), raw.norm(dim=-1, keepdim=True), moved, length, length**2), 1)

    def leaving(self, choice: Tensor) -> Tensor:
        """The vectors ``[n, D]`` if each text leaves at its choice."""
        return self.unit[choice, torch.arange(len(choice))]


class Head:
    """A ridge regression of the logarithm of a depth's distance."""

    def __init__(self, features: Tensor, off: Tensor):
        wanted = off.clamp_min(LEAST).log().double()
        inputs = features.double()
        self.mean, self.spread = inputs.mean(0), inputs.std(0).clamp_min(1e-9)
        inputs = (inputs - self.mean) / self.spread
        moment = inputs.mT @ inputs / len(inputs) + RIDGE * torch.eye(inputs.shape[1], dtype=torch.double)
        self.offset = wanted.mean()
        self.weight = torch.linalg.solve(moment, inputs.mT @ (wanted - self.offset) / len(inputs))

    def __call__(self, features: Tensor) -> Tensor:
        """Predicted distances ``[n]``."""
        return (((features.double() - self.mean) / self.spread) @ self.weight + self.offset).exp()


def first_within(off: Tensor, tolerance: float, last: int) -> Tensor:
    """The first choice ``[n]`` whose distance of ``[choices, n]`` is tolerated, or else the last one."""
    within = torch.cat((off[:last] <= tolerance, torch.ones_like(off[:1], dtype=torch.bool)))
    return within.int().argmax(0)


def cheapest(off: Tensor, price: float) -> Tensor:
    """The choice of the least distance plus the price of its layers."""
    return (off + price * COSTS[:, None]).argmin(0)


class Measure:
    """STS and retrieval of all sets if texts leave where a policy says."""

    def __init__(self, source: Source, names: Sequence[str]):
        self.groups = {name: Group(source.vectors(name), source) for name in (
            "sts", *(f"{name}-{use}" for name in names for use in ("documents", "queries")))}  # fmt: skip
        known = held_out_sets(source.data)
        self.scored = GridEvaluator(sts=known["sts"]).sts
        self.relevant = {}
        for name in names:
            found = read_retrieval(str(known["retrieval"][name]))
            places = {key: place for place, key in enumerate(sorted(found.corpus))}
            self.relevant[name] = [
                {places[key]: gain for key, gain in found.relevant[query].items() if key in places}
                for query in found.queries
            ]

    def sts(self, choices: Mapping[str, Tensor]) -> float:
        vectors = self.groups["sts"].leaving(choices["sts"])
        found = [spearman(vectors[s.first], vectors[s.second], s.scores) for s in self.scored.values()]
        return sum(found) / len(found)

    def ndcg(self, choices: Mapping[str, Tensor]) -> float:
        found = []
        for name, relevant in self.relevant.items():
            asked, there = (self.groups[key].leaving(choices[key]) for key in (f"{name}-queries", f"{name}-documents"))
            found.append(ranking(asked, there, relevant)[0])
        return sum(found) / len(found)

    def row(self, policy: str, kind: str, setting: float, choose, restart: bool) -> dict:
        """One policy on one kind of sets; ``choose`` says where the texts of a group leave."""
        names = [name for name in self.groups if (name == "sts") == (kind == "sts")]
        choices = {name: choose(name) for name in names}
        if kind == "ndcg of full queries":
            choices |= {name: torch.full_like(choice, LAST) for name, choice in choices.items() if "queries" in name}
        costs = COSTS + torch.tensor([0.0, 0, 0, 0, max(SMALL) if restart else 0])
        means, shares = [], []
        for name, choice in choices.items():
            tokens = self.groups[name].tokens
            means.append(float((costs[choice] * tokens).sum() / tokens.sum()))
            shares.append(one_hot(choice, len(COSTS)).double().mean(0))
            if name.endswith("queries"):  # too few to cost anything
                means.pop()
        share = [round(float(value), 3) for value in torch.stack(shares).mean(0)]
        value = self.sts(choices) if kind == "sts" else self.ndcg(choices)
        return {"policy": policy, "kind": kind, "setting": setting, "layers": sum(means) / len(means),
                "value": value, "left": share}  # fmt: skip


def mixed(fixed: list[dict], layers: float) -> float:
    """What two fixed sizes give in proportion, at a mean cost between theirs."""
    for less, more in pairwise(fixed):
        if layers <= more["layers"]:
            part = (layers - less["layers"]) / (more["layers"] - less["layers"])
            return less["value"] + part * (more["value"] - less["value"])
    return fixed[-1]["value"]


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    texts: Path = typer.Option(..., help="Of elastic_data.py: heads are fitted to some."),
    work: Path = typer.Option(..., help="Folder of vectors."),
    model: str = typer.Option("minilm", help="Folder, hub id or alias."),
    adapter: str = typer.Option("minilm", help="Of the trained sizes."),
    sets: str = typer.Option(",".join(RETRIEVAL)),
    out: Path = typer.Option(Path("benchmarks/results/elastic_exit.json")),
):
    start = time.monotonic()
    source = Source(data, texts, model, adapter, work)
    measure = Measure(source, sets.split(","))
    fit = [Group(source.vectors(name), source) for name in FITTED]
    off = torch.cat([group.off for group in fit], 1)
    heads = [Head(torch.cat([group.features[place] for group in fit]), off[place]) for place in range(len(SMALL))]
    predicted = {name: torch.stack([head(group.features[place]) for place, head in enumerate(heads)])
                 for name, group in measure.groups.items()}  # fmt: skip
    rows: list[dict] = []
    for kind in KINDS:
        own = [name for name in measure.groups if (name == "sts") == (kind == "sts")]

        def fixed(name: str, place: int) -> Tensor:
            return torch.full((len(measure.groups[name].tokens),), place)

        sizes = [measure.row("fixed", kind, float(COSTS[place]), partial(fixed, place=place), False)
                 for place in range(len(COSTS))]  # fmt: skip
        found = []
        true = torch.cat([measure.groups[name].off[:-1].flatten() for name in own])
        guessed = torch.cat([predicted[name].flatten() for name in own])
        for share in SHARES:
            tolerance, guess = float(true.quantile(share)), float(guessed.quantile(share))
            found.append(measure.row("oracle", kind, tolerance, lambda name, t=tolerance: first_within(
                measure.groups[name].off, t, LAST), False))  # fmt: skip
            price = 0.15 * 0.25**share  # so that all costs come up
            found.append(measure.row("oracle-best", kind, price, lambda name, p=price: cheapest(
                measure.groups[name].off, p), False))  # fmt: skip
            found.append(measure.row("head", kind, guess, lambda name, t=guess: first_within(
                predicted[name], t, LAST), True))  # fmt: skip
            found.append(measure.row("head-small", kind, guess, lambda name, t=guess: first_within(
                predicted[name], t, LAST - 1), False))  # fmt: skip
        full = sizes[-1]["value"]
        for row in found:
            row["over"] = row["value"] - mixed(sizes, row["layers"])
            row["over_share"] = row["over"] / full
        rows += sizes + found
        for place in range(len(SMALL)):
            guessed = torch.cat([predicted[name][place] for name in own]).log()
            true = torch.cat([measure.groups[name].off[place] for name in own]).clamp_min(LEAST).log()
            alike = float(torch.corrcoef(torch.stack([guessed, true.double()]))[0, 1])
            rows.append({"policy": "prediction", "kind": kind, "setting": float(SMALL[place]), "value": alike})
    write_json(out, rows, run_meta(time.monotonic() - start))
    columns = ("policy", "kind", "setting", "layers", "value", "over", "over_share", "left")
    Console(width=160).print(table([{key: str(row.get(key)) if key == "left" else row.get(key) for key in columns}
                                    for row in rows]))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
