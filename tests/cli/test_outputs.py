"""Every command looks at the places of its results before it loads anything, and says in one line what is wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nestling.embed
import nestling.embed.demo  # with the real readers: a first import below would keep the fakes
import nestling.kv.demo
import nestling.models
from nestling.cli import app

FILES = {  # commands with options that name files
    ("kv", "fit", "m", "--out", "new"): ["--json"],
    ("kv", "train", "m", "--out", "new"): ["--json", "--html"],
    ("kv", "search", "m", "a", "--out", "new"): ["--json"],
    ("kv", "eval", "m", "a"): ["--json", "--html"],
    ("kv", "inspect", "a"): ["--json", "--png"],
    ("embed", "align", "m", "--out", "new"): ["--json"],
    ("embed", "train", "m", "--out", "new"): ["--json", "--html"],
    ("embed", "pretrain", "m", "--steps", "3", "--out", "new"): ["--json", "--html"],
    ("embed", "eval", "m"): ["--json", "--html"],
    ("embed", "export", "m", "--out", "new"): ["--json"],
    ("demo", "kv"): ["--json", "--out"],
    ("demo", "embed"): ["--json", "--out"],
}
FOLDERS = [(command, "--out") for command in FILES if "--out" in command] + [(("demo", "embed"), "--keep")]
NEW = [case for case in FOLDERS if case[0][0] == "embed"]  # where the folder must not exist
OPTIONS = [(command, option) for command, options in FILES.items() for option in options]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    def load(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(nestling.models, "load_model", load)
    monkeypatch.setattr("nestling.embed.elastic.load_encoder", load)
    monkeypatch.setattr("nestling.kv.KVAdapter.from_pretrained", load)
    monkeypatch.setattr("nestling.data.texts.read_texts", load)
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder", "mine").write_text("mine")
    Path("file").write_text("mine")
    yield
    assert sorted(os.listdir()) == ["file", "folder"] and os.listdir("folder") == ["mine"]
    assert Path("file").read_text() == "mine"


def refused(command, option, path) -> None:
    arguments = [*command]
    if option in arguments:
        arguments[arguments.index(option) + 1] = path
    else:
        arguments += [option, path]
    result = CliRunner().invoke(app, arguments)
    said = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 1 and "error: " in said and "Traceback" not in said, said
    assert Path(path).name in said and "loaded" not in said and "nestling, not yours" not in said, said


@pytest.mark.parametrize("path", ["folder", "file", "missing/x", "file/x", "/sys/x"])
@pytest.mark.parametrize(
    "command, option", OPTIONS, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_a_file_that_cannot_be_written(command, option, path):
    refused(command, option, path)


@pytest.mark.parametrize("path", ["file", "missing/x", "file/x", "/sys/x"])
@pytest.mark.parametrize(
    "command, option", FOLDERS, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_a_folder_that_cannot_be_written(command, option, path):
    refused(command, option, path)


@pytest.mark.parametrize(
    "command, option", NEW[:-1], ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_a_folder_that_must_be_new(command, option):
    refused(command, option, "folder")


@pytest.mark.parametrize("command", [("kv", "fit", "m"), ("kv", "train", "m"), ("kv", "search", "m", "a")])
def test_a_folder_with_a_file_under_an_adapters_name(command):
    path = Path("folder", "nestling_adapter.json")
    path.write_text(json.dumps({"kind": "theirs"}))
    refused((*command, "--out", "folder"), "--out", "folder")
    assert json.loads(path.read_text()) == {"kind": "theirs"}
    path.unlink()


@pytest.mark.parametrize("command", [command for command in FILES if command[1] in ("train", "pretrain")])
def test_checkpoints_that_are_there_already(command):
    for resume, name, words in ((False, "checkpoint-3", "holds checkpoints"), (True, "other", "is no training")):
        Path("new-checkpoints", name).mkdir(parents=True)
        result = CliRunner().invoke(app, [*command, *["--resume"] * resume])
        assert result.exit_code == 1 and words in result.output and "loaded" not in result.output
        assert os.listdir("new-checkpoints") == [name]
        shutil.rmtree("new-checkpoints")
    Path("new-checkpoints").write_text("mine")
    refused(command, "--out", "new")
    Path("new-checkpoints").unlink()


def test_one_place_for_two_results():
    refused(("kv", "eval", "m", "a", "--html", "x"), "--json", "x")
    refused(("kv", "fit", "m", "--json", "x"), "--out", "x")
