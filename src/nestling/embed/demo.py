"""`nestling demo embed`: an encoder in several sizes, trained ones or aligned, a table of them, a search with one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from nestling.data.sentences import sentences
from nestling.data.texts import read_texts
from nestling.embed.elastic import ElasticEncoder
from nestling.embed.evaluation.agreement import full_vectors
from nestling.embed.model.parts import Encoder
from nestling.embed.report import write_demo
from nestling.report.tables import table

LONGEST = 20  # words of a sentence; longer ones are cut
QUERIES = (
    "What happens when an error is raised?",
    "repeat a block for every item of a list",
    "a small function without a name",
    "wait for something without blocking",
)
COLUMNS = {
    "size": "size", "parameters": "million parameters", "word_share": "of them words", "vector": "bytes a vector",
    "speed": "texts a second", "cut": "agreement, cut", "made": "agreement, {way}",
}  # fmt: skip


def run(model: str, out: Path, size: str | None, keep: Path, console: Console) -> list[dict]:
    """The demo: sizes that come trained, or are aligned; measure each, search with one, and write the report.

    Args:
        size: the one that is searched with; by default the second smallest.
        keep: a new folder for the encoder.

    Returns:
        A row a size, as in `COLUMNS`.
    """
    start = time.perf_counter()
    with console.status(f"loading {model}"):
        encoder = ElasticEncoder.from_pretrained(model)
    if size is not None:
        encoder.sizes.named(size)  # a size that there is not is said now
    pages = list(read_texts(None))
    openings = [opening(page) for page in pages]
    unseen = sentences(pages[::8], longest=LONGEST)
    texts = sentences([page for i, page in enumerate(pages) if i % 8], longest=LONGEST)
    with console.status("measuring the sizes as they are"):
        reference = full_vectors(encoder.model, unseen)
        cut = ElasticEncoder(encoder.model, encoder.sizes).agreement(unseen, reference=reference, method="cut")
    way = "aligned" if encoder.adapter is None else "trained"
    if encoder.adapter is None:
        began = time.perf_counter()
        encoder.align(texts)
        seconds = time.perf_counter() - began
        console.print(f"Aligned on {len(texts):,} sentences in {seconds:.0f} s: no labels, no training, no gradient.")
    else:
        console.print("Its small sizes come trained; the full one is the stock model, bit for bit.")
    with console.status(f"measuring them {way}"):
        after = encoder.agreement(unseen, reference=reference, method=way)
        rows = _sizes(encoder, openings)
    columns = {name: title.format(way=way) for name, title in COLUMNS.items()}
    for row, before, now in zip(rows, cut, after, strict=True):
        row |= {"cut": before["agreement"], "made": now["agreement"]}
    console.print(
        table(rows, columns, title=f"{model} in {len(rows)} sizes; agreement on {len(unseen)} unseen sentences")
    )
    words = words_are(rows)
    console.print(words)
    chosen = size or rows[min(1, len(rows) - 1)]["size"]
    full = rows[-1]["size"]
    answers = _answers(encoder, {f"by {chosen}": chosen, f"by the full {full}": full}, openings, pages)
    console.print(table(answers, title=f"Search in {len(pages)} pages, the two nearest"))
    encoder.save_pretrained(keep)
    elapsed = time.perf_counter() - start
    write_demo(out, rows, columns, answers, words, title=f"nestling: {model} in {len(rows)} sizes", seconds=elapsed)
    console.print(f"Report: {out}")
    console.print(
        f"The encoder, all sizes in one: {keep}. One size alone: nestling embed export {keep} --size {chosen}"
    )
    return rows


def words_are(rows: Sequence[dict]) -> str:
    """What layers cannot save: the word embeddings, which every size has."""
    small, full = rows[0], rows[-1]
    return (
        f"Word embeddings are {full['word_share']:.0%} of the parameters of {full['size']} and "
        f"{small['word_share']:.0%} of those of {small['size']}: fewer layers make a small encoder quick, and its "
        "vectors short, but the words stay."
    )


def opening(page: str) -> str:
    """The title of a page and its first sentences."""
    return " ".join([page.splitlines()[0], *sentences([page], longest=LONGEST)[:3]])


def _sizes(encoder: ElasticEncoder, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What each size takes. Encode times are taken in turn, so that other work on the machine slows all alike."""
    seconds: dict[str, list[float]] = {size.name: [] for size in encoder.sizes}
    for _ in range(3):
        for name, taken in seconds.items():
            start = time.perf_counter()
            encoder.encode(list(texts), size=name)
            taken.append(time.perf_counter() - start)
    rows = []
    for size in encoder.sizes:
        small = encoder.cut(size)
        words = Encoder.of(small).backbone.get_input_embeddings().weight.numel()  # type: ignore[operator]
        count = sum(p.numel() for p in small.parameters())
        rows.append({
            "size": size.name, "parameters": count / 1e6, "word_share": words / count, "vector": 4 * size.dims,
            "speed": len(texts) / median(seconds[size.name]),
        })  # fmt: skip
    return rows


def _answers(
    encoder: ElasticEncoder, sizes: dict[str, str], openings: Sequence[str], pages: Sequence[str]
) -> list[dict[str, Any]]:
    """The two best pages of each query, by each size."""
    titles = [page.splitlines()[0] for page in pages]
    rows: list[dict[str, Any]] = [{"query": query} for query in QUERIES]
    for name, size in sizes.items():
        found, queries = encoder.encode(list(openings), size=size), encoder.encode(list(QUERIES), size=size)
        for row, scores in zip(rows, encoder.similarity(queries, found), strict=True):
            row[name] = "; ".join(titles[i] for i in scores.topk(min(2, len(titles))).indices.tolist())
    return rows
