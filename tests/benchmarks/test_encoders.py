"""The encoder benchmark's book-keeping: whose a work folder is, and what is measured again. Trainings are left out."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import typer

from nestling.embed.ladder import Ladder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
quality, rivals = importlib.import_module("embed_quality"), importlib.import_module("embed_rivals")
sys.path.pop(0)

ROWS = [{"anchor": "a", "positive": "b", "negative": "c"}, {"anchor": "d", "positive": "e", "negative": "f"}]
METHODS = {"cut", "full-then-cut", "separate", "st-2d", "st-mrl", "student", "srl", "srl-teacher"}


def job(work, **changes):
    made = rivals.Job("tiny", Ladder.parse("1x8,4x32"), ROWS, [], work, 2, 2, 1e-4, 0)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": 3}, "steps: 2, now 3"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"model": "other"}, "model: tiny, now other"),
        ({"ladder": Ladder.parse("4x32")}, "ladder: 1x8,4x32, now 4x32"),
        ({"rows": ROWS[:1]}, "rows: 2, now 1"),
        ({"rows": ROWS[::-1]}, "data: "),
        ({"dev": [{}]}, "data: "),
        ({"batch": 4}, "batch: 2, now 4"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.0001, now 0.001"),
    ],
)
def test_a_work_folder_is_one_jobs(tmp_path, changes, named):
    job(tmp_path / "work").begin()
    job(tmp_path / "work").begin()
    with pytest.raises(ValueError, match=f"holds the trainings of another job .*{named}"):
        job(tmp_path / "work", **changes).begin()


def test_a_folder_without_a_job_is_not_gone_on_in(tmp_path):
    (tmp_path / "srl").mkdir()
    with pytest.raises(ValueError, match="holds something else"):
        job(tmp_path).begin()


def test_methods_have_the_names_of_the_results():
    assert METHODS <= set(rivals.WAYS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(seed, **options)``: the script with a way that trains nothing; what it wrote."""

    def measured(sized, way, job, data, name):
        cup = {"model": name, "method": way, "size": "4x32"}
        return [cup | {"seed": job.seed, "mean_sts": 0.5 + job.seed}]

    monkeypatch.setattr(quality, "measured", measured)
    monkeypatch.setattr(quality, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(quality, "triplets", lambda data, count, seed, prompts: ROWS)
    monkeypatch.setattr(quality, "dev_set", lambda data: [])
    monkeypatch.setattr(quality, "load_encoder", lambda name: None)
    monkeypatch.setattr(quality, "stored_prompts", lambda encoder: {})

    def start(seed, **options):
        out = tmp_path / "out.json"
        given = dict(model="tiny", name=None, ladder="1x8,4x32", ways="cut", teacher=None, steps=2, batch=2)
        given |= dict(bf16=False, length=128)
        work = tmp_path / f"work{seed}"
        quality.main(data=tmp_path, work=work, learning_rate=1e-4, seed=seed, out=out, **given | options)
        return json.loads(out.read_text())

    return start


def test_several_seeds_meet_in_one_file(run):
    run(0)
    again, both = run(0), run(1)
    assert len(again["rows"]) == len(again["meta"]["runs"]) == 1
    assert [row["seed"] for row in both["rows"]] == [run["seed"] for run in both["meta"]["runs"]] == [0, 1]
    assert {"method", "command", "date", "commit", "seconds"} <= set(both["meta"]["runs"][1])


def test_other_settings_are_refused(run, tmp_path):
    run(0)
    with pytest.raises(typer.BadParameter, match="has other settings for tiny"):
        run(1, steps=3)
    with pytest.raises(typer.BadParameter, match="srl-teacher needs --teacher"):
        run(0, ways="srl-teacher")
    with pytest.raises(typer.BadParameter, match="--ways has no full: expected some of cut"):
        run(0, ways="full")
