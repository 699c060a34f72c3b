"""mteb on sizes of encoders: its numbers are those of our own evaluation, and what it knows of a size is right."""

import json

import pytest

pytest.importorskip("mteb")
import mteb
from mteb.cache import ResultCache

from nestling.embed import ElasticEncoder
from nestling.errors import DataError, LadderError, LoadError
from nestling.integrations.mteb import SizedModel, retrieval_task, sts_task

from ..embed.families import save_backbone, sentence_model, some_texts
from ..embed.sets import scored, searched


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny one of random weights, aligned, which has prompts."""
    model = sentence_model(save_backbone("bert", tmp_path_factory.mktemp("bert"), "right"))
    model.prompts = {"query": "w7 w8 w9 ", "document": "w20 ", "passage": ""}
    return ElasticEncoder(model, "2x8,4x16,4x32").align(some_texts(200, seed=5), progress=False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A file of scored pairs, and a BEIR folder."""
    place = tmp_path_factory.mktemp("sets")
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, scored())))
    data, folder = searched(), place / "made"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", data.corpus), ("queries", data.queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"_id": k, "text": t}) for k, t in texts.items()))
    lines = [f"{query}\t{document}\t1" for query, gains in data.relevant.items() for document in gains]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return place / "pairs.jsonl", folder


def scores(model, tasks):
    found = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False, co2_tracker=False)
    return {result.task_name: result.get_score() for result in found.task_results}


@pytest.mark.parametrize("size", ["2x8", "4x16", "4x32", None])
def test_numbers_are_those_of_our_own_evaluation(encoder, sets, size):
    pairs, folder = sets
    rows = {row["size"]: row for row in encoder.evaluate(sts={"pairs": pairs}, retrieval={"made": folder})}
    found = scores(SizedModel(encoder, size), [sts_task(pairs), retrieval_task(folder)])
    row = rows[size or "4x32"]
    assert found == pytest.approx({"pairs": row["pairs"], "made": row["ndcg_made"]}, abs=1e-4)


def test_what_mteb_knows_of_a_size_is_what_it_knows_of_its_export(encoder, tmp_path):
    meta = SizedModel(encoder, "2x8").mteb_model_meta
    assert meta.name.startswith("nestling/") and meta.name.endswith("-2x8")
    assert (meta.embed_dim, meta.max_tokens, meta.use_instructions) == (8, 64, True)
    cut = encoder.cut("2x8")
    assert meta.n_parameters == sum(p.numel() for p in cut.parameters())
    encoder.export("2x8", tmp_path / "cup")
    exported = SizedModel(tmp_path / "cup").mteb_model_meta
    assert exported.revision == meta.revision and exported.n_parameters == meta.n_parameters
    other = SizedModel(encoder, "4x16").mteb_model_meta
    assert other.revision != meta.revision and other.name != meta.name


def test_results_of_sizes_are_kept_apart(encoder, sets, tmp_path):
    for size in ("2x8", "4x16"):
        mteb.evaluate(SizedModel(encoder, size), sts_task(sets[0]), cache=ResultCache(tmp_path), co2_tracker=False)
    kept = [path.parent.parent.name for path in tmp_path.rglob("pairs.json")]
    assert len(kept) == len(set(kept)) == 2 and {name.rpartition("-")[2] for name in kept} == {"2x8", "4x16"}


def test_what_cannot_be_read_or_is_no_size(encoder, tmp_path):
    with pytest.raises(LadderError):
        SizedModel(encoder, "9x8")
    with pytest.raises(LoadError):
        SizedModel(tmp_path / "nowhere")
    with pytest.raises(DataError):
        sts_task(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError):
        retrieval_task(tmp_path)


@pytest.mark.real
@pytest.mark.slow
def test_minilm_has_a_full_model_meta(sets, tmp_path):
    encoder = ElasticEncoder.from_pretrained("minilm")
    meta = SizedModel(encoder, "2x192").mteb_model_meta
    assert meta.name == "nestling/all-MiniLM-L6-v2-2x192"
    assert meta.adapted_from == "sentence-transformers/all-MiniLM-L6-v2"
    assert meta.license == "apache-2.0" and meta.languages == ["eng-Latn"] and meta.max_tokens == 256
    rows = {row["size"]: row for row in encoder.evaluate(sts={"pairs": sets[0]}, retrieval={"made": sets[1]})}
    for size in ("2x192", "6x384"):
        found = scores(SizedModel(encoder, size), [sts_task(sets[0]), retrieval_task(sets[1])])
        expected = {"pairs": rows[size]["pairs"], "made": rows[size]["ndcg_made"]}
        assert found == pytest.approx(expected, abs=1e-4)
