"""What a training is measured on where nobody says: some of its own rows, which it is then not trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from nestling.data.retrieval import Retrieval
from nestling.embed.evaluation.agreement import NEIGHBOURS
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.training.data import Examples
from nestling.embed.training.job import TrainingJob

SHARE = 10  # one row in so many, at most
FEWEST = NEIGHBOURS + 2  # rows that say anything


def held_out(examples: Examples, count: int) -> tuple[Examples, Examples | None]:
    """The rows to train on, and ``count`` others, a tenth of all at most, from all over; None if those are too few.

    Rows of a user's own kind are all trained on: what they are to be measured by is not known.
    """
    count = min(count, len(examples) // SHARE)
    if count < FEWEST or examples.kind == "rows":
        return examples, None
    every = len(examples) // count
    places = set(range(0, every * count, every))
    kept = _rows(examples, [row for row in range(len(examples)) if row in places])
    if kept.labels is not None and len(set(kept.labels)) < 2:
        return examples, None
    return _rows(examples, [row for row in range(len(examples)) if row not in places]), kept


def evaluator_of(job: TrainingJob, kept: Examples) -> BaseEvaluator:
    """What measures the sizes on held-out rows, with the prompts of the training.

    Pairs are measured by the search for their positives among all of them, scored pairs by the correlation with their
    scores.
    """
    first, second = [*kept.columns, *kept.columns][:2]
    prompts = [job.prompts.get(name, "") for name in (first, second)]
    if kept.kind == "scored":
        columns: Any = (*kept.columns.values(), kept.labels)
        rows = [dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in zip(*columns, strict=True)]
        return GridEvaluator(sts={"held_out": rows}, prompts={"sts": prompts[0]})
    queries = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(kept.columns[first]))}
    corpus = {text: f"d{number}" for number, text in enumerate(dict.fromkeys(kept.columns[second]))}
    relevant: dict[str, dict[str, float]] = {name: {} for name in queries.values()}
    for asked, text in zip(kept.columns[first], kept.columns[second], strict=True):
        relevant[queries[asked]][corpus[text]] = 1.0
    data = Retrieval("held_out", {n: t for t, n in corpus.items()}, {n: t for t, n in queries.items()}, relevant)
    return GridEvaluator(retrieval={"held_out": data}, prompts={"query": prompts[0], "passage": prompts[1]})


def _rows(examples: Examples, places: list[int]) -> Examples:
    columns = {name: [column[place] for place in places] for name, column in examples.columns.items()}
    labels = None if examples.labels is None else [examples.labels[place] for place in places]
    return replace(examples, columns=columns, labels=labels)
