"""Metrics against independent implementations: scipy and scikit-learn, and a search written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import ndcg_score

from nestling.embed.evaluation import metrics
from nestling.embed.evaluation.metrics import ranking, spearman


def vectors(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), st.integers(1, 8), st.integers(0, 1000), st.integers(2, 5))
def test_spearman_is_the_correlation_of_ranks(count, width, seed, levels):
    first, second = vectors(count, width, seed), vectors(count, width, seed + 1) * 7
    pairs = list(zip(first.numpy(), second.numpy(), strict=True))
    scores = [float(i % levels) for i in range(count)]  # with ties
    cosines = [float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    if width == 1:
        cosines = [round(cosine) for cosine in cosines]
    found = spearman(first, second, scores)
    if len(set(cosines)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(rankdata(cosines), rankdata(scores))[0, 1], abs=0.02)


def test_spearman_without_an_order_is_not_a_number():
    same, other = torch.ones(4, 3), vectors(4, 3, 0)
    assert math.isnan(spearman(same, same, [1, 2, 3, 4]))
    assert math.isnan(spearman(same, other, [1, 1, 1, 1]))
    assert spearman(torch.zeros(4, 3), other, [1, 2, 3, 4]) != 0  # NaN too: a zero vector has no direction


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 150), st.integers(0, 1000), st.data())
def test_ranking_against_scikit_learn(asked, there, seed, data):
    queries, corpus = vectors(asked, 6, seed), vectors(there, 6, seed + 1) * 3
    gain = st.dictionaries(st.integers(0, there - 1), st.sampled_from([1.0, 2.0, 3.0]), min_size=1)
    relevant = [data.draw(gain) for _ in range(asked)]
    ndcg, recall = ranking(queries, corpus, relevant)
    scores = (queries / queries.norm(dim=1, keepdim=True)) @ (corpus / corpus.norm(dim=1, keepdim=True)).T
    truth = np.array([[gains.get(i, 0.0) for i in range(there)] for gains in relevant])
    if there > 1:  # scikit-learn wants at least two documents
        assert ndcg == pytest.approx(ndcg_score(truth, scores.numpy(), k=10), abs=1e-5)
    tops = [set(row.argsort(descending=True)[:100].tolist()) for row in scores]
    expected = np.mean([len(top & set(gains)) / len(gains) for top, gains in zip(tops, relevant, strict=True)])
    assert recall == pytest.approx(expected)


def test_equal_scores_keep_the_order_of_the_corpus():
    query, corpus = torch.ones(1, 4), torch.ones(300, 4)
    assert ranking(query, corpus, [{0: 1.0}]) == (1.0, 1.0)
    assert ranking(query, corpus, [{9: 1.0}])[0] == pytest.approx(1 / math.log2(11))
    assert ranking(query, corpus, [{10: 1.0}]) == (0.0, 1.0)
    assert ranking(query, corpus, [{99: 1.0, 100: 1.0}]) == (0.0, 0.5)


def test_gains_are_graded():
    queries, corpus = torch.eye(1, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])  # ranked 0, 1, 2
    found, _ = ranking(queries, corpus, [{0: 1.0, 1: 3.0}])
    assert found == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))


def test_chunks_do_not_matter(monkeypatch):
    queries, corpus = vectors(7, 5, 0), vectors(50, 5, 1)
    relevant = [{i: 1.0, i + 9: 2.0} for i in range(7)]
    whole = ranking(queries, corpus, relevant)
    monkeypatch.setattr(metrics, "CHUNK", 120)  # two queries at a time
    assert ranking(queries, corpus, relevant) == pytest.approx(whole)
