"""Reader of retrieval sets in the layout of BEIR (arXiv 2104.08663): corpus, queries and relevance judgements."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nestling.errors import DataError
from nestling.records import lines, not_empty, objects, short, text_of


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set.

    Attributes:
        name: the folder's.
        corpus: document text by id; the title, if there is one, goes in front, as BEIR does.
        queries: query text by id, only those with a relevant document.
        relevant: for each query, its relevant documents and their gains, all above zero.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, float]]


def read_retrieval(folder: str | os.PathLike[str], split: str = "test") -> Retrieval:
    """Read a folder with ``corpus.jsonl``, ``queries.jsonl`` (either gzipped or not) and ``qrels/<split>.tsv``.

    Lines of the corpus have ``_id, text`` and perhaps ``title``, those of the queries ``_id, text``; the judgements
    are three columns, query id, document id and gain, separated by tabs, under a header. Documents may be blank
    (published sets have such), queries may not. Judgements of zero or less say that a document is not relevant.

    Raises:
        DataError: a file is missing, empty or damaged, a line is not as described, an id appears twice, a judgement
            names an unknown query or document, or no query has a relevant document.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    corpus = _texts(_jsonl(path, "corpus"), documents=True)
    queries = _texts(_jsonl(path, "queries"), documents=False)
    judgements = path / "qrels" / f"{split}.tsv"
    if not judgements.is_file():
        there = ", ".join(sorted(p.stem for p in judgements.parent.glob("*.tsv"))) or "none"
        raise DataError(f"{judgements}: no such file; splits that are there: {there}")
    relevant: dict[str, dict[str, float]] = {}
    for query, document, gain in _judged(str(judgements), corpus, queries):
        if gain > 0:
            relevant.setdefault(query, {})[document] = gain
    if not relevant:
        raise DataError(f"{judgements}: no query has a relevant document (a gain above zero)")
    asked = {query: text for query, text in queries.items() if query in relevant}
    return Retrieval(path.resolve().name, corpus, asked, {query: relevant[query] for query in asked})


def _jsonl(folder: Path, stem: str) -> str:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (path := folder / (stem + suffix)).is_file():
            return str(path)
    raise DataError(f"{folder}: no {stem}.jsonl or {stem}.jsonl.gz; expected a folder in the layout of BEIR")


def _texts(name: str, documents: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, row in not_empty(name, objects(name)):
        key, text = text_of(where, row, "_id"), text_of(where, row, "text")
        title = text_of(where, row, "title") if documents and row.get("title") is not None else ""
        if key in texts:
            raise DataError(f"{where}: '_id' {short(key)} appears twice")
        if not documents and not text.strip():
            raise DataError(f"{where}: 'text' is blank")
        texts[key] = f"{title} {text}".strip()
    return texts


def _judged(name: str, corpus: dict[str, str], queries: dict[str, str]) -> Iterator[tuple[str, str, float]]:
    seen = set()
    for number, (where, line) in enumerate(not_empty(name, lines(name))):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 3:
            raise DataError(f"{where}: expected 3 columns separated by tabs (query, document, gain), got {len(cells)}")
        query, document, gain = cells[0], cells[1], _number(cells[2])
        if gain is None and number == 0 and query not in queries:
            continue  # the header
        if gain is None:
            raise DataError(f"{where}: the gain must be a finite number, got {short(cells[2])}")
        if query not in queries:
            raise DataError(f"{where}: query {short(query)} is not in the queries")
        if document not in corpus:
            raise DataError(f"{where}: document {short(document)} is not in the corpus")
        if (query, document) in seen:
            raise DataError(f"{where}: query {short(query)} and document {short(document)} are judged twice")
        seen.add((query, document))
        yield query, document, gain


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
