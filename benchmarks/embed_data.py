"""Texts of the embedding benchmarks: triplets to train on and sets to measure on, all from one folder of data sets."""

import random
from collections.abc import Mapping
from pathlib import Path

from nestling.data.pairs import Pair, read_pairs, read_sts

STS = ("sts12_test", "sts13_test", "sts14_test", "sts15_test", "stsb_test_minus_sts16_sick")
RETRIEVAL = ("scifact", "cranfield", "cisi")
DEV = 600  # pairs: what checkpoints are chosen by


def triplets(data: Path, count: int, seed: int, prompts: Mapping[str, str]) -> list[Pair]:
    """Rows ``anchor, positive, negative``: a third each of entailed and contradicted sentences, of captions of one
    picture, and of queries with a passage, in random order. Captions and queries have another one as a negative.

    Args:
        count: of the rows, at most.
        prompts: of the model, by name; passages take ``passage``, all other texts ``query``.
    """
    rng, share = random.Random(seed), count // 3
    entailed = rng.sample(read_pairs(data / "nli/nli_triplets.jsonl.gz"), share)
    captions = _captions(data, share, rng)
    asked = rng.sample(read_pairs(data / "pairs/query_passage_train.jsonl.gz"), share)
    asked = [
        {"anchor": row["query"], "positive": row["passage"], "negative": other["query"]}
        for row, other in zip(asked, _next(asked), strict=True)
    ]
    rows = [_prompted(row, prompts, "query") for row in [*entailed, *captions]]
    rows += [_prompted(row, prompts, "passage") for row in asked]
    return rng.sample(rows, len(rows))


def _captions(data: Path, count: int, rng: random.Random) -> list[Pair]:
    """One pair from each of many pictures, not all that there are of a few."""
    pairs = read_pairs(data / "pairs/caption_groups.jsonl.gz")
    first = {row["anchor"]: row for row in rng.sample(pairs, len(pairs))}
    found = rng.sample(list(first.values()), count)
    return [{**row, "negative": other["positive"]} for row, other in zip(found, _next(found), strict=True)]


def _next(rows: list[Pair]) -> list[Pair]:
    """Another row for each row."""
    return rows[1:] + rows[:1]


def _prompted(row: Pair, prompts: Mapping[str, str], positive: str) -> Pair:
    by = {"anchor": "query", "positive": positive, "negative": "query"}
    return {column: prompts.get(by[column], "") + row[column] for column in by}


def held_out_sets(data: Path) -> dict[str, dict[str, Path]]:
    """What `GridEvaluator` takes, ``sts`` and ``retrieval``."""
    scored = {name.split("_")[0]: data / "sts" / f"{name}.jsonl.gz" for name in STS}
    return {"sts": scored, "retrieval": {name: data / "retrieval" / name for name in RETRIEVAL}}


def dev_set(data: Path) -> list[dict]:
    rows = read_sts(data / "sts/stsb_dev_minus_sts16_sick.jsonl.gz")
    return random.Random(0).sample(rows, DEV)
