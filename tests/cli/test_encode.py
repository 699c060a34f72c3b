"""``nestling embed encode``: what it writes, says and refuses."""

import json

import numpy as np

from nestling.embed import Vectors

from .test_embed import flat, place, run  # noqa: F401


def test_a_corpus_is_encoded_with_ids(place, tmp_path):  # noqa: F811
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("doc,body\n" + "".join(f"d{n},Stone number {n}.\n" for n in range(9)))
    arguments = [
        "embed", "encode", place / "trained", "--text", corpus, "--columns", "text=body,id=doc", "--sizes", "1x8,2x16",
        "--out", tmp_path / "vectors", "--format", "npy", "--dtype", "int8", "--shard-rows", 4, "--json",
        tmp_path / "rows.json",
    ]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "9 texts at 1x8, 2x16 in 3 shards" in flat(result)
    found = Vectors.open(tmp_path / "vectors")
    assert found.ids == [f"d{n}" for n in range(9)] and len(set(found.spaces.values())) == 1
    assert np.allclose(np.linalg.norm(found.read("2x16"), axis=1), 1, atol=1e-6)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["rows"] == 9
    result = run(*arguments[:-4], "--shard-rows", 5)
    assert result.exit_code == 1 and "another job (shard_rows differ)" in flat(result)


def test_unknown_engines_are_refused(place, tmp_path):  # noqa: F811
    result = run("embed", "encode", place / "model", "--out", tmp_path / "vectors", "--engine", "cloud")
    assert result.exit_code == 1 and "--engine cloud is unknown" in flat(result)
    assert not (tmp_path / "vectors").exists()
