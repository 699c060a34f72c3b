"""Retrieval sets in the layout of BEIR (arXiv 2104.08663): corpus, queries and relevance judgements.

Judgements are taken as BEIR, MTEB and trec_eval take them: a document that is not in the corpus is never found; of two
judgements of a pair the last one counts; a query whose judgements are all zero counts, and finds nothing.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling.data.jsonl import check_text, field_of, not_empty, short, text_of
from nestling.data.judgements import PLAIN, ROWS, Judgement, id_of, read_judgements
from nestling.data.rows import FILES, open_rows
from nestling.data.told import logger, tell_left_out
from nestling.errors import DataError
from nestling.options import flag


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set, as `read_retrieval` and `Retrieval.of` make them.

    Attributes:
        name: the folder's.
        corpus: document text by id; the title, if there is one, goes in front, as BEIR does.
        queries: query text by id, only those that are judged.
        relevant: for each query, its relevant documents and their gains, all above zero; documents that are not in the
            corpus are among them, and are never found.
        ignore_identical_ids: whether a document with the id of a query is that query, and is not searched for it.
        left_out: how many judgements cannot count, by the reason.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, float]]
    ignore_identical_ids: bool | None = None
    left_out: Counter[str] = field(default_factory=Counter, compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        corpus: Mapping[Any, Any],
        queries: Mapping[Any, str],
        relevant: Mapping[Any, Mapping[Any, float] | Iterable[Any]],
        ignore_identical_ids: bool | None = None,
    ) -> "Retrieval":
        """A set of what BEIR's loader gives, or what sentence-transformers' InformationRetrievalEvaluator takes.

        Args:
            corpus: documents by id: texts, or mappings with ``text`` and perhaps ``title``.
            queries: texts by id.
            relevant: for each query, gains by document, or documents, which then have a gain of 1.
            ignore_identical_ids: see `read_retrieval`.

        Raises:
            DataError: an id or a text is none, or no query has a relevant document in the corpus.
        """
        texts = {id_of(name, "_id", key): _document(f"{name}, document {key}", row) for key, row in corpus.items()}
        asked = {}
        for key, text in queries.items():
            check_text(f"{name}, query {key}", "text", text)
            asked[id_of(name, "_id", key)] = text
        return _made(name, name, texts, asked, _judgements(name, relevant), ignore_identical_ids)


def read_retrieval(
    folder: str | os.PathLike[str], split: str = "test", *, ignore_identical_ids: bool | None = None
) -> Retrieval:
    """Read a folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

    Rows of the corpus have ``_id, text`` and perhaps ``title``, those of the queries ``_id, text``; ids are texts or
    integers, and may be called ``id``. For the judgements see `nestling.data.judgements.read_judgements`. Each file
    may also be of another kind that has rows (``.csv``, ``.parquet``, ..., gzipped or not). Documents may be blank
    (published sets have such), judged queries may not. Judgements of zero or less say that a document is not relevant.

    Judgements of unknown queries or documents, and those that are there twice, are counted and told of.

    Args:
        folder: of the set; ``FOLDER:SPLIT`` names the split as well.
        split: of the judgements: ``test``, ``dev``, ``train``.
        ignore_identical_ids: whether a document with the id of a query is that query itself, as in ArguAna and Quora,
            so that it is no answer to it. By default it is where texts are the same, or ids are names, and no query
            has the document of its id as an answer: sets in which both are numbered from 1 on share ids by accident.

    Raises:
        DataError: a file is missing, empty or damaged, a line is not as described, an id appears twice with other
            texts, or no query has a relevant document in the corpus.
    """
    path, split = _place(folder, split)
    corpus = _texts(_file(path, "corpus", FILES), documents=True)
    queries = _texts(_file(path, "queries", FILES), documents=False)
    judged = _split(path, split)
    judgements = not_empty(judged, read_judgements(judged))
    return _made(path.resolve().name, judged, corpus, queries, judgements, ignore_identical_ids)


def _made(
    name: str,
    where: str,
    corpus: dict[str, str],
    queries: dict[str, str],
    judgements: Iterator[Judgement],
    ignore: bool | None,
) -> Retrieval:
    if ignore is not None:
        flag("ignore_identical_ids", ignore)
    left_out: Counter[str] = Counter()
    gains: dict[str, dict[str, float]] = {}
    for place, query, document, gain in judgements:
        if query not in queries:
            left_out["judgements of unknown queries"] += 1
            continue
        if not queries[query].strip():
            raise DataError(f"{place}: the text of query {short(query)} is blank: leave it out")
        found = gains.setdefault(query, {})
        if document in found:
            left_out["judgements that are there twice, of which the last counts"] += 1
        elif document not in corpus:
            left_out["judgements of unknown documents, which are never found"] += 1
        found[document] = gain
    judged = [query for query in queries if query in gains]
    relevant = {query: {d: gain for d, gain in gains[query].items() if gain > 0} for query in judged}
    if not any(document in corpus for found in relevant.values() for document in found):
        raise DataError(
            f"{where}: no query has a relevant document (a gain above zero) in the corpus; {_shown(left_out)}"
        )
    tell_left_out(where, left_out, doubtful=True)
    asked = {query: queries[query] for query in relevant}
    if ignore is None and (ignore := _are_documents(corpus, asked, relevant)):
        shared = sum(query in corpus for query in asked)
        logger.warning("%s: %d queries are documents: these are no answer to themselves", where, shared)
    return Retrieval(name, corpus, asked, relevant, ignore, left_out)


def _are_documents(corpus: dict[str, str], queries: dict[str, str], relevant: dict[str, dict[str, float]]) -> bool:
    """Whether queries are those documents that have their ids, rather than counted apart from 1 on."""
    shared = [query for query in queries if query in corpus]
    same = sum(_plain(corpus[query]).endswith(_plain(queries[query])) for query in shared)  # a title may be in front
    if not shared or 2 * same >= len(shared):
        return bool(shared)
    return not any(query in relevant[query] for query in shared) and not all(query.isdecimal() for query in shared)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _judgements(name: str, relevant: Mapping[Any, Any]) -> Iterator[Judgement]:
    for key, documents in relevant.items():
        query = id_of(name, "query", key)
        found = documents.items() if isinstance(documents, Mapping) else ((document, 1.0) for document in documents)
        for document, gain in found:
            yield f"{name}, query {query}", query, id_of(name, "document", document), float(gain)


def _place(folder: str | os.PathLike[str], split: str) -> tuple[Path, str]:
    path = Path(folder)
    before, colon, after = os.fspath(folder).rpartition(":")
    if colon and not path.exists() and Path(before).is_dir():
        return Path(before), after
    if not path.is_dir():
        raise DataError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    return path, split


def _file(folder: Path, stem: str, kinds: tuple[str, ...]) -> str:
    for suffix in kinds:
        if (path := folder / (stem + suffix)).is_file():
            return str(path)
    raise DataError(f"{folder}: no {stem}.jsonl or {stem}.jsonl.gz; expected a folder in the layout of BEIR")


def _split(folder: Path, split: str) -> str:
    judgements, kinds = folder / "qrels", (*PLAIN, *ROWS)
    for suffix in kinds:
        if (path := judgements / (split + suffix)).is_file():
            return str(path)
    names = sorted(path.name for path in judgements.glob("*") if path.name.endswith(kinds))
    there = ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "none"
    raise DataError(f"{judgements / split}.tsv: no such file; splits that are there: {there} (give {folder}:SPLIT)")


def _texts(name: str, documents: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, row in not_empty(name, open_rows(name).rows):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected the columns _id and text, got {short(row)}")
        key = id_of(where, "_id", field_of(where, row, "id" if "id" in row and "_id" not in row else "_id"))
        text = _document(where, row) if documents else text_of(where, row, "text")
        if texts.setdefault(key, text) != text:
            raise DataError(f"{where}: '_id' {short(key)} appears twice, with other texts")
    return texts


def _document(where: str, row: Any) -> str:
    if not isinstance(row, Mapping):
        check_text(where, "text", row)
        return row
    title = text_of(where, dict(row), "title") if row.get("title") is not None else ""
    return f"{title} {text_of(where, dict(row), 'text')}".strip()


def _shown(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "all are judged as not relevant"
