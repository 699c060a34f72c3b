"""Agreement of cups with the full model, against scipy-free references written out."""

import pytest
import torch
from torch.nn.functional import normalize

from nestling.embed.evaluation.agreement import agreement, full_vectors
from nestling.embed.evaluation.metrics import spearman
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import encode
from nestling.embed.model.projection import fit_projections
from nestling.errors import EvaluationError

from ..families import some_texts

TEXTS = list(dict.fromkeys(some_texts(30, seed=5)))
LADDER = Ladder.parse("1x8,2x16,4x32")


def test_the_full_cup_agrees_with_itself(encoder):
    row = agreement(encoder(), TEXTS, LADDER, method="m")[-1]
    assert row == {"method": "m", "size": "4x32", "agreement": pytest.approx(1), "overlap": 1}


def test_rows_are_those_of_a_loop_over_texts(encoder):
    model = encoder("modernbert")
    reference = full_vectors(model, TEXTS)
    small = normalize(encode(model, TEXTS, {1: 8})[1], dim=-1)
    correlations, shared = [], []
    for i in range(len(TEXTS)):
        others = [j for j in range(len(TEXTS)) if j != i]
        wanted = [float(reference[i] @ reference[j]) for j in others]
        correlations.append(spearman(small[[i] * len(others)], small[others], wanted))
        nearest = set(torch.tensor(wanted).topk(10).indices.tolist())
        shared.append(len(nearest & set((small[others] @ small[i]).topk(10).indices.tolist())) / 10)
    row = agreement(model, TEXTS, LADDER)[0]
    assert row["agreement"] == pytest.approx(sum(correlations) / len(TEXTS), abs=1e-6)
    assert row["overlap"] == pytest.approx(sum(shared) / len(TEXTS))


def test_projections_and_references_of_another_model(encoder, backbones):
    model = encoder()
    turns = fit_projections(model, TEXTS, LADDER.layers, kind="pca")  # without centring the full cup's cosines stay
    rows = agreement(model, TEXTS, LADDER, projections=turns)
    assert rows[-1]["agreement"] > 0.999 and rows[0] != agreement(model, TEXTS, LADDER)[0]
    other = full_vectors(encoder("distilbert"), TEXTS)
    assert agreement(model, TEXTS, LADDER, other)[-1]["agreement"] < 0.9


def test_few_texts_are_refused(encoder):
    with pytest.raises(EvaluationError, match="11 texts are too few"):
        agreement(encoder(), TEXTS[:11], LADDER)
