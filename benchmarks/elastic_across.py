"""Queries of the full size on documents of small ones, and what was tried to let them find more.

    python benchmarks/elastic_across.py --data FOLDER --texts texts.txt --work FOLDER [--adapter minilm]

Documents are in the space of the full model by the packaged maps, by maps ``fitted`` to the documents of the set that
no query asks for (`align`), or by others that are fitted to texts of other kinds (``FITTED``): ridge regressions on
this depth's vectors (``ridge``) or on those of all depths up to it (``ridge-depths``), and maps trained for the KL of
a batch's similarities of short texts to long ones (``ranking``). Queries are those of the full size, of the documents'
size (``own``), or both ``joined``, as ``encode_query(documents=)`` has them.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import typer
from elastic_vectors import FITTED, Source, Vectors
from embed_data import RETRIEVAL, held_out_sets
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from nestling.data.retrieval import read_retrieval
from nestling.embed.evaluation.metrics import ranking
from nestling.embed.model.similarity import joined
from nestling.embed.training.refit import nearer
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

DEPTHS, FULL = (1, 2, 3), 6
RIDGE = 0.03  # in mean variances
STEPS, RATE, TEMPERATURE = 300, 5e-4, 0.05  # of ranking
Map = Callable[[Vectors], Tensor]


class Across:
    """Vectors of all groups, and the maps of a depth."""

    def __init__(self, source: Source, names: Sequence[str]):
        self.source, self.turns = source, source.adapter.projections
        self.fit = {name: source.vectors(name) for name in FITTED}
        self.sets = {name: (source.vectors(f"{name}-queries"), source.vectors(f"{name}-documents"))
                     for name in names}  # fmt: skip
        self.relevant, self.unjudged = {}, {}
        for name in names:
            found = read_retrieval(str(held_out_sets(source.data)["retrieval"][name]))
            places = {key: place for place, key in enumerate(sorted(found.corpus))}
            self.relevant[name] = [
                {places[key]: gain for key, gain in found.relevant[query].items() if key in places}
                for query in found.queries
            ]
            judged = {key for gains in found.relevant.values() for key in gains}
            free = [place for key, place in places.items() if key not in judged and found.corpus[key].strip()]
            self.unjudged[name] = torch.tensor(free)

    @torch.no_grad()
    def full(self, vectors: Vectors) -> Tensor:
        return normalize(self.turns[FULL](vectors.full), dim=-1)

    def packaged(self, depth: int) -> Map:
        return lambda vectors: self.turns[depth](vectors.small[depth])

    def fitted(self, depth: int, name: str) -> Map:
        documents, rows = self.sets[name][1], self.unjudged[name]
        turn = nearer(self.turns[depth], documents.small[depth][rows].double(), self.full(documents)[rows].double())
        return lambda vectors: turn(vectors.small[depth])

    def ridge(self, depths: range) -> Map:
        inputs = torch.cat([self._inputs(vectors, depths) for vectors in self.fit.values()]).double()
        wanted = torch.cat([self.full(vectors) for vectors in self.fit.values()]).double()
        means, centred = (inputs.mean(0), wanted.mean(0)), inputs - inputs.mean(0)
        moment = centred.mT @ centred / len(centred)
        moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.double)
        solved = torch.linalg.solve(moment, centred.mT @ (wanted - means[1]) / len(centred))
        return lambda vectors: ((self._inputs(vectors, depths).double() - means[0]) @ solved + means[1]).float()

    def _inputs(self, vectors: Vectors, depths: range) -> Tensor:
        return torch.cat([vectors.small[depth] for depth in depths], 1)

    def ranking(self, depth: int) -> Map:
        """The packaged map, trained for what full queries, which are short texts, find among small documents."""
        weight = self.turns[depth].encode.detach().clone().requires_grad_(True)
        mean, sharpness = self.turns[depth].mean, torch.tensor(-0.5, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, sharpness], lr=RATE, weight_decay=0.01)
        falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        wanted, draw = (
            {name: self.full(vectors) for name, vectors in self.fit.items()},
            torch.Generator().manual_seed(0),
        )
        for _ in range(STEPS):
            rows = {name: torch.randint(len(full), (256,), generator=draw) for name, full in wanted.items()}
            true = torch.cat([wanted[name][some] for name, some in rows.items()])
            inputs = torch.cat([self.fit[name].small[depth][some] for name, some in rows.items()])
            small = normalize((inputs - mean) @ weight, dim=-1)
            asked = true[:128]  # of "texts"
            like = (asked @ true.mT / TEMPERATURE).log_softmax(-1)
            own = (asked @ small.mT * sharpness.exp() / TEMPERATURE).log_softmax(-1)
            loss = (1 - (small * true).sum(-1)).mean() + (like.exp() * (like - own)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falls.step()
        trained = weight.detach()
        return lambda vectors: (vectors.small[depth] - mean) @ trained

    @torch.no_grad()
    def row(self, way: str, queries: str, depth: int, maps: Callable[[str], Map]) -> dict:
        """nDCG@10 of one way and kind of queries; ``maps`` are by the name of the set."""
        found = {}
        for name, (asked, documents) in self.sets.items():
            turn = maps(name)
            full, own = self.full(asked), normalize(turn(asked), dim=-1)
            vectors = {"full": full, "own": own, "joined": joined(full, own)}[queries]
            found[f"ndcg_{name}"] = ranking(vectors, turn(documents), self.relevant[name])[0]
        mean = sum(found.values()) / len(found)
        return {"way": way, "queries": queries, "size": f"{depth}x384", **found, "mean_ndcg": mean}


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    texts: Path = typer.Option(..., help="Of elastic_data.py: maps are fitted to some."),
    work: Path = typer.Option(..., help="Folder of vectors."),
    model: str = typer.Option("minilm", help="Folder, hub id or alias."),
    adapter: str = typer.Option("minilm", help="Of the trained sizes."),
    sets: str = typer.Option(",".join(RETRIEVAL)),
    out: Path = typer.Option(Path("benchmarks/results/elastic_across.json")),
):
    start = time.monotonic()
    across = Across(Source(data, texts, model, adapter, work), sets.split(","))
    whole = {name: ranking(across.full(asked), across.full(documents), across.relevant[name])[0]
             for name, (asked, documents) in across.sets.items()}  # fmt: skip
    full = sum(whole.values()) / len(whole)
    rows = [{"way": "full", "queries": "full", "size": "6x384", **{f"ndcg_{name}": value for name, value in
                                                                   whole.items()}, "mean_ndcg": full}]  # fmt: skip
    for depth in DEPTHS:
        packaged = across.packaged(depth)
        rows += [across.row("packaged", queries, depth, lambda name, turn=packaged: turn)
                 for queries in ("full", "own", "joined")]  # fmt: skip
        fitted = {name: across.fitted(depth, name) for name in across.sets}
        rows += [across.row("fitted", queries, depth, fitted.__getitem__) for queries in ("full", "joined")]
        others = {"ridge": across.ridge(range(depth, depth + 1)), "ridge-depths": across.ridge(range(1, depth + 1))}
        others["ranking"] = across.ranking(depth)
        rows += [across.row(way, "full", depth, lambda name, turn=turn: turn) for way, turn in others.items()]
    for row in rows:
        row["share_ndcg"] = row["mean_ndcg"] / full
    write_json(out, rows, run_meta(time.monotonic() - start))
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
