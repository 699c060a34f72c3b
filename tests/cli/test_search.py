"""``nestling embed search``: what it finds in the vectors that ``embed encode`` wrote, and what it refuses."""

import json

import pytest

from .test_embed import flat, place, run  # noqa: F401

TEXTS = [f"{thing} number {number}." for number in range(60) for thing in ("Stone", "A bell", "Rope")]


@pytest.fixture(scope="module")
def vectors(place, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("search")
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(TEXTS))
    )
    result = run(
        "embed", "encode", place / "trained", "--text", folder / "corpus.jsonl", "--sizes", "1x8,2x16", "--out",
        folder / "vectors",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "vectors"


def test_a_text_finds_itself_at_any_size_of_the_space(place, vectors, tmp_path):  # noqa: F811
    arguments = ["embed", "search", place / "trained", "--vectors", vectors, "--query", TEXTS[7], "--query", TEXTS[90]]
    result = run(*arguments, "--top", 2, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0 and "180 vectors of 2x16: all 16 coordinates" in flat(result), result.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["rank"], row["id"]) for row in rows if row["rank"] == 1] == [(1, "d7"), (1, "d90")] and len(rows) == 4
    result = run(*arguments, "--size", "1x8", "--query-size", "2x16", "--top", 3)
    assert result.exit_code == 0 and "180 vectors of 1x8" in flat(result), result.output


def test_a_plan_is_kept_and_read(place, vectors, tmp_path):  # noqa: F811
    arguments = ["embed", "search", place / "trained", "--vectors", vectors, "--query", TEXTS[7], "--top", 3]
    for _ in range(2):
        result = run(*arguments, "--recall", 0.9, "--plan", tmp_path / "plan")
        assert result.exit_code == 0 and "recall@3 1.0000" in flat(result), result.output
    result = run(*arguments, "--recall", 0.8, "--plan", tmp_path / "plan")
    assert result.exit_code == 1 and "is of other dims, --top or --recall" in flat(result)
    result = run(*arguments, "--plan", tmp_path / "plan")
    assert result.exit_code == 1 and "give that as well" in flat(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "4x32"], "has 1x8, 2x16"),
        (["--size", "2x16", "--query-size", "1x8"], "is narrower than the vectors"),
        (["--adapter", "none"], "search with the model and adapter that made them"),
    ],
)
def test_what_cannot_be_compared_is_refused(place, vectors, options, message):  # noqa: F811
    result = run("embed", "search", place / "trained", "--vectors", vectors, "--query", "Rope", *options)
    assert result.exit_code == 1 and message in flat(result), result.output
