"""`choose_plan`: the cheapest plan that has the recall wanted, by measuring on the user's own vectors."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nestling.basis import pca
from nestling.embed.search.config import PlanConfig
from nestling.embed.search.exact import exact_best, recall
from nestling.embed.search.flat import FlatIndex
from nestling.embed.search.plan import Plan
from nestling.embed.search.prefix import PrefixTable
from nestling.errors import SearchError

COUNTS = 41  # numbers of candidates that are tried, of which every fourth is twice as large
SCATTERED = 16  # what a byte of a candidate costs, against one that is read in order: measured, at 200,000 vectors
FEWEST = 1000  # vectors below which all of them are searched
SAMPLE = 50_000  # vectors that a basis is made from
ERRORS = 2  # standard errors that a recall must be above the target
TIMED = 50  # queries whose time is measured


def choose_plan(vectors: Any, config: PlanConfig | None = None, *, queries: Any = None) -> Plan:
    """The cheapest plan that has the recall wanted.

    Half of the queries choose: for each width of the prefix the fewest candidates are taken whose mean recall, less
    two standard errors, is the target; of these the plan that reads the fewest bytes. The other half measure it.

    Args:
        vectors: ``[n, dims]`` of documents, compared by dot products; of unit length where cosines are meant.
        config: see `PlanConfig`.
        queries: ``[m, >= dims]`` vectors of queries, perhaps of a larger size in the same space; by default some of
            the documents, each of which is not counted as its own result.

    Returns:
        The plan; a full one where there are few vectors, or no prefix has the recall.

    Raises:
        SearchError: there are fewer vectors than results wanted, or shapes do not go together.
    """
    config = PlanConfig.of(config)
    documents = np.asarray(vectors, dtype=np.float32)
    if documents.ndim != 2 or len(documents) <= config.k:
        raise SearchError(f"vectors of shape {documents.shape}: expected [n, dims] with more than k={config.k} rows")
    dims, draw = documents.shape[1], np.random.default_rng(config.seed)
    Plan.full(dims).turned(documents)  # their numbers are looked at first
    basis = _basis(documents[draw.permutation(len(documents))[:SAMPLE]])
    turned = replace(Plan.full(dims, config.k), basis=basis)
    table, own = turned.turned(documents), None
    if queries is None:
        own = draw.choice(len(table), min(config.queries, len(table)), replace=False)
    asked = table[own] if own is not None else turned.turned(np.asarray(queries, dtype=np.float32))
    if len(asked) < 2:
        raise SearchError(f"{len(asked)} queries: expected two or more, some hundred are good")
    half = len(asked) // 2
    expected = exact_best(table, asked, config.k, own)
    tried = [
        _fewest(places, width, table, config)
        for width in config.widths
        if width < dims and len(table) >= FEWEST
        for places in [_places(table, width, asked[:half], expected[:half], own)]
    ]
    good = [row for row in tried if row["candidates"] is not None and row["bytes"] < table.nbytes]
    chosen = min(good, key=lambda row: row["bytes"], default=None)
    inner = Plan.full(dims, config.k)  # of vectors that are turned already
    if chosen is not None:
        inner = replace(inner, width=chosen["width"], candidates=chosen["candidates"])
    measures = _measures(inner, table, asked[half:], expected[half:], None if own is None else own[half:])
    return replace(
        inner, basis=None if chosen is None else basis, target=config.recall, tried=tuple(tried), **measures
    )


def _basis(documents: np.ndarray) -> np.ndarray:
    """The principal components of vectors, not centred: dot products stay as they are."""
    sample = torch.from_numpy(documents)
    return pca((sample.T @ sample).double() / len(sample)).encode.float().contiguous().numpy()


def _places(table: np.ndarray, width: int, asked: np.ndarray, expected: np.ndarray, own: Any) -> np.ndarray:
    """How many vectors the prefix puts before each of those that are expected, ``[m, k]``."""
    prefix = PrefixTable(table[:, :width])
    found = []
    for place, query in enumerate(asked):
        scores = prefix.scores(query[:width])
        if own is not None:
            scores[own[place]] = -torch.inf
        mine = scores[torch.from_numpy(expected[place])]
        found.append([int((scores >= score).count_nonzero()) for score in mine])
    return np.array(found)


def _fewest(places: np.ndarray, width: int, table: np.ndarray, config: PlanConfig) -> dict[str, Any]:
    """The fewest candidates of a width that have the recall, and the bytes that a search with them reads."""
    row: dict[str, Any] = {"width": width, "candidates": None, "recall": None, "bytes": None}
    for step in range(COUNTS):
        count = round(config.k * 2 ** (step / 4))
        if count >= len(table):
            break
        shares = (places <= count).mean(1)
        error = shares.std() / np.sqrt(len(shares))
        row["recall"] = float(shares.mean())
        if shares.mean() - ERRORS * error >= config.recall:
            nbytes = len(table) * width + SCATTERED * count * 4 * table.shape[1]
            return row | {"candidates": count, "bytes": nbytes}
    return row


def _measures(plan: Plan, table: np.ndarray, asked: np.ndarray, expected: np.ndarray, own: Any) -> dict[str, Any]:
    """The recall and the time of a plan, on other queries than those that chose it."""
    k = plan.k
    index, exact = FlatIndex(plan), FlatIndex(Plan.full(plan.dims, k))
    names = [str(number) for number in range(len(table))]
    index.add(names, table)
    exact.add(names, table)
    found = []
    for place, query in enumerate(asked):
        hits = [int(hit.id) for hit in index._search(query, k + (own is not None), max(plan.candidates, k + 1))]
        found.append([number for number in hits if own is None or number != own[place]][:k])
    return {
        "recall": recall(found, expected.tolist()),
        "milliseconds": _milliseconds(index, asked),
        "exact_milliseconds": _milliseconds(exact, asked),
    }


def _milliseconds(index: FlatIndex, asked: np.ndarray) -> float:
    """The median processor time of a query, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for query in asked[:TIMED]:
            start = time.thread_time()  # other work on the machine does not count
            index._search(query, index.plan.k, index.plan.candidates)
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(times)) * 1e3
