"""Rows that are trained on: what is taken, what is refused, and the order of the batches."""

import pytest

from nestling.embed.training.data import Examples, order

PAIRS = [{"anchor": f"a{i}", "positive": f"p{i}"} for i in range(10)]
SCORED = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": float(i % 3), "subset": "x"} for i in range(10)]


def test_texts_are_taken_once():
    found = Examples.of(["one", "two", "one"])
    assert found == Examples("texts", {"text": ["one", "two"]}) and len(found) == 2


def test_pairs_and_triplets():
    assert Examples.of(PAIRS).columns["positive"][:2] == ["p0", "p1"]
    triplets = Examples.of([row | {"negative": "no"} for row in PAIRS])
    assert triplets.kind == "pairs" and list(triplets.columns) == ["anchor", "positive", "negative"]


def test_scored_pairs_without_other_fields():
    found = Examples.of(SCORED)
    assert found.kind == "scored" and list(found.columns) == ["sentence1", "sentence2"]
    assert found.labels[:4] == [0, 1, 2, 0]


def test_rows_for_a_loss_of_ones_own():
    rows = [{"query": f"q{i}", "good": "g", "bad": "b", "label": [i, 0.5]} for i in range(3)]
    found = Examples.of(rows, own_loss=True)
    assert found.kind == "rows" and list(found.columns) == ["query", "good", "bad"] and found.labels[1] == [1, 0.5]


def test_a_loss_of_ones_own_gets_every_text():
    """Also those that the known forms do not have; ids and the subset of scored pairs are nothing to learn from."""
    found = Examples.of([row | {"hint": "h", "id": i} for i, row in enumerate(PAIRS)], own_loss=True)
    assert found.kind == "rows" and list(found.columns) == ["anchor", "positive", "hint"]
    found = Examples.of([row | {"sentence3": "c"} for row in SCORED], own_loss=True)
    assert list(found.columns) == ["sentence1", "sentence2", "sentence3"] and found.labels[:2] == [0, 1]
    assert Examples.of(SCORED, own_loss=True).kind == "scored" and Examples.of(PAIRS, own_loss=True).kind == "pairs"


def test_queries_and_passages_keep_their_names():
    found = Examples.of([{"query": f"q{i}", "passage": "p", "negative": "n", "id": i} for i in range(3)])
    assert found.kind == "pairs" and list(found.columns) == ["query", "passage", "negative"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "nothing to train on"),
        ("a text", "expected a list of texts or of rows, got one str, 'a text'"),
        (["a", 3], "text 2: 'text' must be text, got 3"),
        (["a", " "], "text 2: 'text' is blank: give a text, or leave the row out"),
        (["a", "a", "a"], "all texts are the same, 'a'"),
        ([{"anchor": "a", "positive": "a"}] * 3, "all texts are the same"),
        ([*PAIRS, {"anchor": "a"}], "row 11: no field 'positive'; it has 'anchor'"),
        ([*PAIRS, "text"], "row 11: expected columns, got 'text'"),
        ([{"anchor": "a", "positive": ""}], "row 1: 'positive' is blank"),
        ([{"anchor": "a", "positive": None}], "row 1: 'positive' must be text, got None"),
        (["a", "\ud800"], "text 2: 'text' has half a surrogate pair"),
        ([row | {"hard_neg": "h"} for row in PAIRS], "row 1: hard_neg beside anchor, positive would be lost"),
        (
            [*PAIRS, PAIRS[0] | {"negative": "n"}],
            "row 11: negative beside anchor, positive would be lost: have it in",
        ),
        ([*PAIRS, PAIRS[0] | {"label": 1}], "row 11: label beside anchor, positive would be lost"),
        ([*SCORED, SCORED[0] | {"negative": ["n"]}], "row 11: negative beside sentence1, sentence2, score"),
        (
            [{"left": "a", "right": "b"}],
            "row 1: fields 'left', 'right' are no form of pair; expected anchor",
        ),
        ([row | {"score": 1.0} for row in SCORED], "all scores are the same"),
        ([*SCORED, SCORED[0] | {"score": float("nan")}], "row 11: 'score' must be a finite number"),
        ([*SCORED, SCORED[0] | {"score": "high"}], "row 11: 'score' must be a finite number, got 'high'"),
        ([3], "row 1: expected columns, got 3"),
    ],
)
def test_bad_rows_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        Examples.of(data)


def test_batches_are_passes_in_orders_of_their_own():
    found = order(Examples.of(PAIRS), 5, 4, seed=3).tolist()
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]
    assert found == order(Examples.of(PAIRS), 5, 4, seed=3).tolist() != order(Examples.of(PAIRS), 5, 4, 4).tolist()


def test_no_text_comes_twice_in_a_batch():
    rows = [{"anchor": f"a{i % 8}", "positive": f"p{i}"} for i in range(40)]
    found = order(Examples.of(rows), 8, 30, seed=0).view(30, 8)
    for batch in found.tolist():
        assert len({row % 8 for row in batch}) == 8
    assert set(found.flatten().tolist()) == set(range(40))  # rows that wait are not forgotten


def test_rows_that_all_share_a_text_are_taken_anyway():
    rows = [{"anchor": "the same", "positive": f"p{i}"} for i in range(6)]
    assert len(order(Examples.of(rows), 4, 3, seed=0)) == 12
