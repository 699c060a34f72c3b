"""The command ``nestling embed search``."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.options import takes
from nestling.cli.terminal import (
    Adapter,
    Encoder,
    Json,
    check_outputs,
    console,
    errors_as_messages,
    loaded_encoder,
    show,
    write_results,
)
from nestling.config import Config, option
from nestling.errors import OptionError, SearchError
from nestling.options import number, whole


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Config):
    """What is searched, and how exactly."""

    size: str | None = option(None, "Size of the vectors; default: the largest that is there.")
    query_size: str | None = option(None, "Size of the queries; default: that of the vectors; the full one is best.")
    top: int = option(10, "Results a query.", whole)
    recall: float | None = option(
        None, "Search by a prefix that has this recall, such as 0.99; default: exactly.",
        partial(number, above=0, below=1),
    )  # fmt: skip
    plan: Path | None = option(None, "File that the plan for --recall is kept in.")


@errors_as_messages
@takes(options=SearchOptions)
def search(
    model: Encoder,
    vectors: Annotated[Path, typer.Option(help="Folder that `embed encode` has written.")],
    query: Annotated[list[str], typer.Option(help="Text to search for; may be repeated.")],
    options: SearchOptions,
    adapter: Adapter = "auto",
    json: Json = None,
) -> None:
    """Search the vectors of a corpus by texts, at any size of MODEL in their space, exactly or by a measured plan."""
    from nestling.embed.corpus.encode import space_of
    from nestling.embed.corpus.vectors import Vectors
    from nestling.embed.ladder import Ladder
    from nestling.embed.search.flat import FlatIndex
    from nestling.embed.search.plan import Plan

    check_outputs(json)
    top, recall = options.top, options.recall
    if options.plan is not None and recall is None:
        raise OptionError("--plan is of a search with --recall: give that as well")
    there = Vectors.open(vectors)
    wanted = Ladder.parse([options.size or there.sizes[-1]]).full
    asked = wanted if options.query_size is None else Ladder.parse([options.query_size]).full
    if wanted.name not in there.sizes:
        raise OptionError(f"--size {wanted}: {vectors} has {', '.join(there.sizes)}")
    if asked.dims < wanted.dims:
        raise SearchError(f"--query-size {asked} is narrower than the vectors of {wanted}: take at least as many dims")
    encoder = loaded_encoder(model, asked.name, adapter)
    space = space_of(encoder, asked.layers)
    if space != there.spaces[wanted.name]:
        raise SearchError(
            f"queries of {asked} are in the space {space}, the vectors of {wanted} in {there.spaces[wanted.name]}: "
            "search with the model and adapter that made them, and, without an adapter, at the same depth"
        )
    stored = there.read(wanted)
    chosen = Plan.full(wanted.dims, top) if recall is None else _plan(stored, recall, top, options.plan)
    index = FlatIndex(chosen, space)
    index.add(there.ids, stored, space=space)
    console.print(f"{len(index):,} vectors of {wanted}: {chosen}")
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    smaller = wanted.name if encoder.adapter is not None and wanted.layers < asked.layers else None
    for text, vector in zip(query, encoder.encode_query(query, asked.name, documents=smaller), strict=True):
        hits = index.search(vector, top, space=space)
        found = [{"rank": rank, "id": hit.id, "score": hit.score} for rank, hit in enumerate(hits, 1)]
        show(found, text)
        rows += [{"model": model, "query": text, **row} for row in found]
    write_results(json, rows, time.perf_counter() - start)


def _plan(stored: Any, recall: float, top: int, file: Path | None) -> Any:
    """The plan that was kept for this recall, or a new one."""
    from nestling.embed.search.choose import choose_plan
    from nestling.embed.search.config import PlanConfig
    from nestling.embed.search.plan import Plan

    config = PlanConfig(recall=recall, k=top)
    if file is not None and file.exists():
        kept = Plan.load(file)
        if (kept.dims, kept.k, kept.target) != (stored.shape[1], top, recall):
            raise OptionError(f"--plan {file} is of other dims, --top or --recall: choose another file, or remove it")
        return kept
    with console.status("choosing a plan"):
        found = choose_plan(stored, config)
    if found.tried:
        show([{name: "-" if value is None else value for name, value in row.items()} for row in found.tried], "plans")
    if file is not None:
        found.save(file)
    return found
