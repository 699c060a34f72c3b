"""Folders appear whole, nothing of a user's is replaced, and what killed writers left is removed."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from nestling.embed.model.folder import write_projections
from nestling.embed.model.projection import Projection
from nestling.errors import FileError
from nestling.files import temporary
from nestling.files.folders import Parts, read_sealed, sha256, waiting, write_folder
from nestling.files.temporary import NAME, sweep, temporary_file, temporary_folder

PARTS = Parts("head.json", ("body.bin",))


def pair(content: bytes, **others: str):
    """A function that fills a folder with a head, a body and others."""

    def fill(new):
        (new / "body.bin").write_bytes(content)
        for name, text in others.items():
            (new / name).write_text(text)
        (new / "head.json").write_text(json.dumps({"sha256": sha256(new / "body.bin")}))
        return content

    return fill


def body(folder) -> bytes | None:
    return read_sealed(folder / "body.bin", json.loads((folder / "head.json").read_text())["sha256"])


def fail(new):
    (new / "half").write_text("")
    raise RuntimeError("broken")


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "deep" / "out", fail)
    assert not list((tmp_path / "deep").iterdir())
    assert write_folder(tmp_path / "deep" / "out", pair(b"1")) == b"1"
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["body.bin", "head.json"]
    with pytest.raises(FileError, match="out exists: choose another"):
        write_folder(tmp_path / "deep" / "out", pair(b"2"))
    assert body(tmp_path / "deep" / "out") == b"1"


def test_only_our_files_are_replaced(tmp_path):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "notes").write_text("mine")
    for content in (b"1", b"2"):
        write_folder(tmp_path, pair(content, card="ours"), over=PARTS)
        assert body(tmp_path) == content == (tmp_path / "body.bin").read_bytes()
    with pytest.raises(RuntimeError):
        write_folder(tmp_path, fail, over=PARTS)
    assert sorted(os.listdir(tmp_path)) == ["body.bin", "card", "head.json", "mine"]
    assert (tmp_path / "mine" / "deep" / "notes").read_text() == "mine"


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "ahead").symlink_to("later")
    for name in ("link", "ahead"):
        write_folder(tmp_path / name, pair(b"1"), over=PARTS)
        assert (tmp_path / name).is_symlink() and body(tmp_path / name) == b"1"
    assert body(tmp_path / "real") == body(tmp_path / "later") == b"1"


def test_a_folder_that_somebody_makes_meanwhile(tmp_path):
    def beaten(new):
        write_folder(tmp_path / "out", pair(b"theirs"), over=PARTS)
        return pair(b"ours")(new)

    write_folder(tmp_path / "out", beaten, over=PARTS)
    assert body(tmp_path / "out") == b"ours" and sorted(os.listdir(tmp_path / "out")) == ["body.bin", "head.json"]
    with pytest.raises(FileError):
        write_folder(tmp_path / "other", lambda new: (beaten_by_other(tmp_path), pair(b"ours")(new)))
    assert body(tmp_path / "other") == b"theirs"


def beaten_by_other(tmp_path):
    write_folder(tmp_path / "other", pair(b"theirs"))


def test_the_next_writer_finishes_what_a_killed_one_began(tmp_path):
    write_folder(tmp_path, pair(b"old"), over=PARTS)
    write_folder(tmp_path / "new", pair(b"new"))
    aside = waiting(tmp_path / "body.bin", sha256(tmp_path / "new" / "body.bin"))
    aside.write_bytes(b"new")  # killed before its head was in place
    assert body(tmp_path) == b"old"
    (tmp_path / "head.json").write_bytes((tmp_path / "new" / "head.json").read_bytes())  # and behind that
    assert body(tmp_path) == b"new"
    with pytest.raises(RuntimeError):
        write_folder(tmp_path, fail, over=PARTS)
    assert body(tmp_path) == b"new" == (tmp_path / "body.bin").read_bytes() and not aside.exists()
    aside.write_bytes(b"newer")  # of which no head speaks
    with pytest.raises(RuntimeError):
        write_folder(tmp_path, fail, over=PARTS)
    assert not aside.exists() and body(tmp_path) == b"new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_several_processes_write_to_one_folder(tmp_path):
    """As those of torchrun do: at any moment there is one of their artefacts, and in the end as well."""
    contents = [bytes([number]) * 50_000 for number in range(4)]
    write_folder(tmp_path, pair(contents[0]), over=PARTS)
    writers = []
    for content in contents:
        if (pid := os.fork()) == 0:
            for _ in range(10):
                write_folder(tmp_path, pair(content), over=PARTS)
            os._exit(0)
        writers.append(pid)
    seen = []
    while writers:
        seen.append(
            next((found for _ in range(5) if (found := body(tmp_path)) is not None), None)
        )  # a head that is old
        writers = [pid for pid in writers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    assert set(seen) <= set(contents)
    assert body(tmp_path) == (tmp_path / "body.bin").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["body.bin", "head.json"]


def test_another_content_is_told(tmp_path):
    write_folder(tmp_path, pair(b"old"), over=PARTS)
    (tmp_path / "body.bin").write_bytes(b"0ld")
    assert body(tmp_path) is None
    (tmp_path / "body.bin").unlink()
    with pytest.raises(FileNotFoundError):
        body(tmp_path)


# What killed processes leave


@pytest.fixture
def ended():
    """The name of a temporary file of a process that has ended."""
    code = "from nestling.files.temporary import _name; print(_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("writer", [temporary_file, temporary_folder])
def test_what_an_ended_process_left_is_removed(tmp_path, ended, writer):
    (tmp_path / ended).mkdir()
    (tmp_path / ended / "weights").write_text("many")
    (tmp_path / f"{ended[:-1]}{'0' if ended[-1] != '0' else '1'}").write_text("a file")
    with writer(tmp_path) as mine:
        assert os.listdir(tmp_path) == [mine.name] and NAME.fullmatch(mine.name)
        sweep(tmp_path)
        assert mine.exists()  # of a process that lives
    assert not os.listdir(tmp_path)


def test_what_lives_or_is_not_ours_stays(tmp_path, ended):
    names = [f".nestling-{ended.split('-')[1]}", ".nestling-notes", f"x{ended}", f"{ended}0", "nestling.json"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / ended).symlink_to("mine")
    code = """
import sys, time
from nestling.files.temporary import temporary_folder
with temporary_folder(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = sorted(os.listdir(tmp_path))
        sweep(tmp_path)
        assert sorted(os.listdir(tmp_path)) == before and len(before) == len(names) + 3
        other.kill()
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == len(before) - 1


def test_a_number_that_was_given_to_another_process(tmp_path, ended):
    """What lives is told by when it was started."""
    _, machine, _, start, rest = ended.removeprefix(".").split("-")
    (tmp_path / f".nestling-{machine}-{os.getpid()}-{int(start) - 1}-{rest}").mkdir()
    sweep(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("days, left", [(0.5, True), (1.5, False)])
def test_what_other_machines_left_is_removed_after_a_day(tmp_path, ended, days, left):
    path = tmp_path / ended.replace(ended.split("-")[1], "00000000")
    path.mkdir()
    (path / "part").write_text("")
    os.utime(path, (0, 0))
    os.utime(path / "part", (time.time() - days * 86400,) * 2)
    sweep(tmp_path)
    assert path.exists() == left


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_what_another_user_left_stays(tmp_path, ended):
    (tmp_path / ended).write_text("")
    os.chown(tmp_path / ended, 65534, 65534)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [ended]


def test_where_there_is_no_proc(tmp_path, ended, monkeypatch):
    """Other systems do not say when a process was started: one of that number is taken for it."""
    monkeypatch.setattr(temporary, "_started", lambda pid: None)
    with temporary_file(tmp_path) as mine:
        assert mine.name.split("-")[3] == "0"
        _, machine, pid, _, rest = ended.removeprefix(".").split("-")
        (tmp_path / f".nestling-{machine}-{pid}-0-{rest}").mkdir()
        sweep(tmp_path)
        assert os.listdir(tmp_path) == [mine.name]


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    """safetensors makes files that only their owner can read, and an adapter is there to be shared."""

    def fill(new):
        save_file({"x": torch.zeros(2)}, new / "body.bin")
        (new / "head.json").write_text(json.dumps({"sha256": sha256(new / "body.bin")}))

    before = os.umask(0o022)
    try:
        for _ in ("a new folder", "an old one"):
            write_folder(tmp_path / "out", fill, over=PARTS)
            assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
        write_projections(tmp_path / "x", {1: Projection(torch.eye(2))})
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644
    finally:
        os.umask(before)
