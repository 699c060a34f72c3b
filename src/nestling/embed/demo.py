"""`nestling demo embed`: an encoder made elastic by following itself, one size of it exported and put to use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer

from nestling.data.sentences import sentences
from nestling.data.texts import read_texts
from nestling.embed.elastic import ElasticEncoder
from nestling.embed.evaluation.agreement import COLUMNS, full_vectors
from nestling.embed.model.folder import check_place
from nestling.embed.model.parts import Encoder
from nestling.embed.report import write_demo
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.trainer import without_bars
from nestling.files.temporary import private_temporary_folder
from nestling.report.tables import table

LONGEST = 20  # words of a sentence; longer ones are cut
BATCH, RATE = 48, 2e-4
QUERIES = (
    "What happens when an error is raised?",
    "repeat a block for every item of a list",
    "a small function without a name",
    "wait for something without blocking",
)


def run(model: str, out: Path, steps: int, size: str | None, keep: Path | None, console: Console) -> list[dict]:
    """The demo: sizes cut, sizes aligned with the full model in closed form, and sizes that have followed it.

    Args:
        size: the one that is exported and searched with; the second smallest by default.
        keep: a folder for the trained encoder and the size, which are thrown away otherwise.
    """
    if keep is not None:
        check_place(keep / "elastic", "training", resume=False)
    with console.status(f"loading {model}"):
        encoder = ElasticEncoder.from_pretrained(model)
    sizes = encoder.sizes
    shown = sizes.cups[min(1, len(sizes) - 1)] if size is None else sizes.cup(size)
    pages = list(read_texts(None))
    openings = [_opening(page) for page in pages]
    with private_temporary_folder() as thrown_away:
        folder = thrown_away if keep is None else keep
        by_full = encoder.encode(openings), encoder.encode(list(QUERIES))  # before the model is trained
        rows = _learn(encoder, pages, folder / "elastic", steps, model, console)
        exported = encoder.export(shown, folder / shown.name, rows=())
        with without_bars():
            small = SentenceTransformer(str(exported.folder), local_files_only=True)  # stock: nestling is not needed
        costs = _costs({f"full {sizes.full}": encoder.model, f"size {shown}": small}, openings)
        by_size = small.encode(openings), small.encode(list(QUERIES))
    console.print(table(costs, title=f"{shown} as a model of its own"))
    titles = [page.splitlines()[0] for page in pages]
    answers = _answers({f"by {shown}": by_size, "by the full model": by_full}, titles)
    console.print(table(answers, title="Search in the pages"))
    write_demo(out, rows, encoder.info["training"], costs, answers, title=f"nestling: {model} in {len(sizes)} sizes")
    console.print()
    console.print(f"Report: {out}" + ("" if keep is None else f"; models: {keep}"))
    return rows


def _learn(
    encoder: ElasticEncoder, pages: list[str], folder: Path, steps: int, name: str, console: Console
) -> list[dict[str, Any]]:
    """Train on seven of eight pages; agreement with the model as it was, on the others, before and after."""
    unseen = sentences(pages[::8], longest=LONGEST)
    texts = sentences([page for i, page in enumerate(pages) if i % 8], longest=LONGEST)
    with console.status("measuring"):
        reference = full_vectors(encoder.model, unseen)
        rows = encoder.agreement(unseen, reference=reference, method="cut")
        encoder.align(texts[::3], progress=False)  # a thousand are enough for a start
        rows = rows + encoder.agreement(unseen, reference=reference, method="aligned")
    began = time.perf_counter()
    encoder.train(texts, TrainConfig(output_dir=folder, steps=steps, batch_size=BATCH, learning_rate=RATE))
    console.print(
        f"Followed itself on {len(texts):,} sentences, {steps} steps of {BATCH}, in "
        f"{time.perf_counter() - began:.0f} s; no labels."
    )
    with console.status("measuring"):
        rows = rows + encoder.agreement(unseen, reference=reference, method="distilled")
    title = f"{name}: agreement of every size with the full model, on {len(unseen)} held-out sentences"
    console.print(table(rows, COLUMNS, title=title))
    return rows


def _opening(page: str) -> str:
    """The title of a page and its first sentences."""
    return " ".join([page.splitlines()[0], *sentences([page], longest=LONGEST)[:3]])


def _costs(models: dict[str, SentenceTransformer], texts: Sequence[str]) -> list[dict[str, Any]]:
    """What each model takes, with encode times in turn, so that other work on the machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(3):
        for name, model in models.items():
            start = time.perf_counter()
            model.encode(list(texts), batch_size=32)
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "model": name,
            "million parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "MB of weights": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
            "bytes per vector": 4 * Encoder.of(model).dims,
            "texts per second": len(texts) / median(seconds[name]),
        }
        for name, model in models.items()
    ]


def _answers(found: dict[str, tuple[Any, Any]], titles: Sequence[str]) -> list[dict[str, Any]]:
    """The two best pages of each query, by each model."""
    rows: list[dict[str, Any]] = [{"query": query} for query in QUERIES]
    for name, (pages, queries) in found.items():
        for row, scores in zip(rows, queries @ pages.T, strict=True):
            row[name] = "; ".join(titles[i] for i in scores.argsort()[::-1][:2])
    return rows
