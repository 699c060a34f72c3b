"""Retrieval as trec_eval, and so BEIR and MTEB, measures it: written out here, and pytrec_eval itself where it is."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from nestling.data.retrieval import Retrieval
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.model.encode import encode

from ..families import some_texts

DOCUMENTS = {f"doc{i}": text for i, text in enumerate(dict.fromkeys(some_texts(140, 3)))}
QUERIES = {f"q{i}": text for i, text in enumerate(some_texts(9, 5))} | {
    f"doc{i}": DOCUMENTS[f"doc{i}"] for i in range(3)
}


def trec(run, qrels):
    """nDCG@10 with linear gains and recall@100, means over the queries that are judged and asked."""
    totals = []
    for query, scores in run.items():
        if query not in qrels:
            continue
        ranked = sorted(scores, key=scores.get, reverse=True)
        gains = {document: gain for document, gain in qrels[query].items() if gain > 0}
        dcg = sum(gains.get(document, 0) / math.log2(rank) for rank, document in enumerate(ranked[:10], 2))
        ideal = sum(gain / math.log2(rank) for rank, gain in enumerate(sorted(gains.values(), reverse=True)[:10], 2))
        found = len(set(ranked[:100]) & set(gains))
        totals.append((dcg / ideal if ideal else 0.0, found / len(gains) if gains else 0.0))
    return tuple(sum(column) / len(totals) for column in zip(*totals, strict=True))


def runs(model, itself):
    """Scores of every document for every query; of the one of its own id only where that counts."""
    (queries,) = encode(model, list(QUERIES.values()), {4: 32}).values()
    (corpus,) = encode(model, list(DOCUMENTS.values()), {4: 32}).values()
    scores = (normalize(queries, dim=-1) @ normalize(corpus, dim=-1).T).tolist()
    return {
        query: {key: score for key, score in zip(DOCUMENTS, row, strict=True) if key != query or not itself}
        for query, row in zip(QUERIES, scores, strict=True)
    }


def judgements(seed=0):
    """Graded, negative and zero ones, of documents that are not there, and a query that has none above zero."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for query in QUERIES:
        places = torch.randperm(len(DOCUMENTS), generator=rng)[:40].tolist()
        gains = torch.randint(-1, 4, (40,), generator=rng).tolist()
        found[query] = {list(DOCUMENTS)[place]: gain for place, gain in zip(places, gains, strict=True)}
    found["q0"] |= {"gone": 3, "lost": 1}
    found["q1"] = dict.fromkeys(found["q1"], 0)
    found["q2"] = {"gone": 2}
    del found["q3"]  # asked and not judged
    found["doc0"] |= {"doc1": 3}
    for query in ("doc0", "doc1", "doc2"):
        found[query].pop(query, None)
    return found | {"nobody": {"doc1": 1}}  # judged and not asked


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_trec_eval(encoder, itself, seed):
    model, qrels = encoder(), judgements(seed)
    data = Retrieval.of("made", DOCUMENTS, QUERIES, qrels, ignore_identical_ids=itself)
    (row,) = GridEvaluator("4x32", retrieval={"r": data}).rows(model)
    run = runs(model, itself)
    assert (row["ndcg_r"], row["recall_r"]) == pytest.approx(trec(run, qrels), abs=1e-6)


@pytest.mark.parametrize("itself", [True, False])
def test_numbers_are_those_of_pytrec_eval(encoder, itself):
    pytrec = pytest.importorskip("pytrec_eval")
    model, qrels = encoder(), judgements()
    data = Retrieval.of("made", DOCUMENTS, QUERIES, qrels, ignore_identical_ids=itself)
    (row,) = GridEvaluator("4x32", retrieval={"r": data}).rows(model)
    run = runs(model, itself)
    found = pytrec.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    for column, name in (("ndcg_r", "ndcg_cut_10"), ("recall_r", "recall_100")):
        assert row[column] == pytest.approx(sum(x[name] for x in found.values()) / len(found), abs=1e-6)


def test_a_query_that_is_a_document_is_not_its_own_hit(encoder):
    model, qrels = encoder(), {f"doc{i}": {key: 1 for key in DOCUMENTS if key != f"doc{i}"} for i in range(3)}
    asked = {key: DOCUMENTS[key] for key in qrels}
    for given in ((DOCUMENTS, asked, qrels), Retrieval("made", DOCUMENTS, asked, qrels)):
        (row,) = GridEvaluator("4x32", retrieval={"r": given}).rows(model)
        assert row["ndcg_r"] == pytest.approx(trec({q: runs(model, True)[q] for q in qrels}, qrels)[0], abs=1e-6)
    (other,) = GridEvaluator("4x32", retrieval={"r": Retrieval("made", DOCUMENTS, asked, qrels, False)}).rows(model)
    assert other["ndcg_r"] < row["ndcg_r"] == pytest.approx(1)


def test_a_perfect_search_is_perfect_only_where_every_document_is_there(encoder):
    model = encoder()
    texts = {"a": DOCUMENTS["doc0"], "b": DOCUMENTS["doc1"]}
    for more, expected in (({}, 1.0), ({"gone": 1}, 1 / (1 + 1 / math.log2(3)))):
        data = Retrieval.of("made", texts, {"q": texts["a"]}, {"q": {"a": 1} | more})
        (row,) = GridEvaluator("4x32", retrieval={"r": data}).rows(model)
        assert row["ndcg_r"] == pytest.approx(expected) and row["recall_r"] == 1 / (1 + len(more))
