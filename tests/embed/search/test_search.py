"""Plans and the index in memory: what is found, what it costs, and what is refused."""

import numpy as np
import pytest
import torch

from nestling.embed import FlatIndex, Plan, PlanConfig, SearchError, choose_plan
from nestling.embed.search.exact import best, exact_best, recall
from nestling.embed.search.prefix import PrefixTable
from nestling.errors import OptionError


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def documents():
    """Vectors that vary mostly in few directions, which are not the first coordinates."""
    draw = np.random.default_rng(0)
    spread = 0.9 ** np.arange(64)
    turn = np.linalg.qr(draw.normal(size=(64, 64)))[0]
    return unit((draw.normal(size=(6000, 64)) * spread) @ turn)


@pytest.fixture(scope="module")
def plan(documents):
    return choose_plan(documents, PlanConfig(recall=0.95, queries=200))


def test_the_plan_has_the_recall_on_queries_that_it_has_not_seen(documents, plan):
    assert not plan.is_full and plan.width < 64 and plan.candidates < 600 and plan.recall > 0.93
    queries = unit(documents[:300] + 0.02 * np.random.default_rng(1).normal(size=(300, 64)))
    index = FlatIndex(plan)
    index.add([f"d{n}" for n in range(6000)], documents)
    found = [[int(hit.id[1:]) for hit in index.search(query)] for query in queries]
    assert recall(found, exact_best(documents, queries, 10).tolist()) > 0.93
    rows = {row["width"]: row["candidates"] for row in plan.tried}
    assert rows[32] <= rows[24] and "find" in str(plan) and f"{plan.recall:.4f}" in str(plan)


def test_the_same_vectors_have_the_same_plan(documents, plan):
    assert choose_plan(documents, PlanConfig(recall=0.95, queries=200)).id == plan.id


def test_scores_are_dot_products_best_first(documents, plan):
    index = FlatIndex(plan)
    index.add([str(n) for n in range(500)], documents[:500])
    hits = index.search(documents[7], 5)
    assert hits[0].id == "7" and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.score == pytest.approx(float(documents[7] @ documents[int(hit.id)]), abs=1e-5)
    assert [hit.id for hit in index.rerank(documents[7], [hit.id for hit in hits[::-1]])] == [hit.id for hit in hits]
    assert [hit.id for hit in index.rerank(documents[7], ["3", "7"], 1)] == ["7"]


def test_a_full_plan_is_exact_search(documents):
    index = FlatIndex(Plan.full(64))
    index.add([str(n) for n in range(6000)], documents)
    expected = exact_best(documents, documents[:20], 10)
    for query, rows in zip(documents[:20], expected, strict=True):
        assert [int(hit.id) for hit in index.search(query)] == rows.tolist()


def test_vectors_come_and_go(documents, plan):
    index = FlatIndex(plan)
    for start in range(0, 900, 300):
        index.add([str(n) for n in range(start, start + 300)], documents[start : start + 300])
    index.delete(["7", "8", "7"])
    assert len(index) == 898 and "7" not in [hit.id for hit in index.search(documents[7], 898)]
    index.add(["7"], documents[7][None])
    assert index.search(documents[7], 1)[0].id == "7" and len(index) == 899
    assert len(index.search(documents[7], 2000)) == 899
    assert FlatIndex(plan).search(documents[7]) == [] and FlatIndex(plan).rerank(documents[7], []) == []


def test_queries_of_a_larger_size_search_documents_of_a_smaller_one(documents):
    narrow = documents[:, :48]
    index = FlatIndex(Plan.full(48), space="one")
    index.add(["a", "b"], narrow[:2], space="one")
    hits = index.search(documents[1], space="one")
    assert hits[0].id == "b" and hits[0].score == pytest.approx(float(narrow[1] @ narrow[1]))


@pytest.mark.parametrize("count", [1, 10, 100, 1000, 100_000])
@pytest.mark.parametrize("length", [50, 20_000, 20_011])
def test_the_best_of_scores_are_the_best(count, length):
    scores = torch.from_numpy(np.random.default_rng(2).normal(size=length).astype(np.float32))
    assert {*best(scores, count).tolist()} == {*scores.topk(min(count, length)).indices.tolist()}


def test_codes_of_a_prefix_keep_the_order(documents):
    table = PrefixTable(documents[:, :32])
    scores, exact = table.scores(documents[3, :32]).numpy(), documents[:, :32] @ documents[3, :32]
    assert np.corrcoef(scores, exact)[0, 1] > 0.999 and table.codes.dtype == torch.int8
    assert not PrefixTable(np.zeros((4, 8), np.float32)).scores(np.zeros(8, np.float32)).any()


def test_few_vectors_and_recalls_out_of_reach_have_a_full_plan(documents):
    assert choose_plan(documents[:200]).is_full
    noise = unit(np.random.default_rng(3).normal(size=(2000, 64)))
    plan = choose_plan(noise, PlanConfig(recall=0.999, widths=(8,), queries=100))
    assert plan.is_full and plan.basis is None and plan.recall == 1 and "every vector" in str(plan)


def test_queries_of_ones_own_choose(documents):
    queries = unit(documents[:100] + 0.05 * np.random.default_rng(1).normal(size=(100, 64)))
    plan = choose_plan(documents, PlanConfig(recall=0.9, k=5), queries=queries)
    assert plan.k == 5 and plan.recall > 0.85


def test_a_plan_is_a_file(plan, tmp_path, documents):
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again == plan and again.id == plan.id and again.tried == plan.tried
    assert np.array_equal(again.turned(documents[:9]), plan.turned(documents[:9]))
    content = (tmp_path / "plan.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-5])
    (tmp_path / "other").write_bytes(content.replace(b'dims\\": 64', b'dims\\": 63'))
    for name in ("cut", "other", "nothing"):
        with pytest.raises(SearchError):
            Plan.load(tmp_path / name)


def test_what_does_not_go_together_is_refused(documents, plan):
    index = FlatIndex(plan, space="one")
    index.add(["a"], documents[:1], space="one")
    with pytest.raises(SearchError, match=r"space='two', and the index is in one"):
        index.search(documents[0], space="two")
    with pytest.raises(SearchError, match="space=None"):
        index.add(["b"], documents[:1])
    with pytest.raises(SearchError, match="'a' is in the index already"):
        index.add(["b", "a"], documents[:2], space="one")
    with pytest.raises(SearchError, match="'b' is given twice"):
        index.add(["b", "b"], documents[:2], space="one")
    with pytest.raises(SearchError, match="2 ids for 1 vectors"):
        index.add(["b", "c"], documents[:1], space="one")
    with pytest.raises(SearchError, match="7 is no text"):
        index.add([7], documents[:1], space="one")
    with pytest.raises(SearchError, match=r"shape \(1, 32\)"):
        index.search(documents[0, :32], space="one")
    with pytest.raises(SearchError, match="a query of shape"):
        index.search(documents[:2], space="one")
    with pytest.raises(SearchError, match="not finite"):
        index.search(documents[0] * np.nan, space="one")
    for call in (index.delete, lambda ids: index.rerank(documents[0], ids, space="one")):
        with pytest.raises(SearchError, match="'b' is not in the index"):
            call(["a", "b"])
    assert len(index) == 1
    with pytest.raises(SearchError, match="more than k=10"):
        choose_plan(documents[:10])
    with pytest.raises(OptionError, match="recall"):
        PlanConfig(recall=1.5)
    with pytest.raises(OptionError, match="at least one width"):
        PlanConfig(widths=())
