"""Places that cannot be written to are told before the work, with their names, and nothing of a user's is replaced."""

import errno
import io
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nestling.embed.evaluation.results import save_results
from nestling.errors import FileError, NestlingError
from nestling.files import writing
from nestling.files.writing import check_file, check_folder, check_result, write_file
from nestling.jobs.results import ResultStore
from nestling.report.figures import write_png
from nestling.report.page import write_html
from nestling.report.results import write_json

GRID = [{"size": "1x8", "mean_sts": 0.5, "model": "m"}, {"size": "2x16", "mean_sts": 0.75, "model": "m"}]
WRITERS = {
    "text": lambda path: write_file(path, "text"),
    "bytes": lambda path: write_file(path, b"bytes"),
    "json": lambda path: write_json(path, [{"a": 1}], {}),
    "html": lambda path: write_html(path, "title", "intro", [], {}),
    "png": lambda path: write_png(path, Figure()),
    "partial": lambda path: ResultStore(path).save(),
}
FOLDERS = {"results": lambda path: save_results(path, GRID, {})}


@pytest.fixture(params=["/sys", "/proc", "read-only", "full"])
def closed(request, tmp_path):
    """A folder into which nothing can be written, also by root."""
    if request.param.startswith("/"):
        if not Path(request.param).is_dir() or os.access(f"{request.param}/x", os.W_OK):
            pytest.skip(f"there is no {request.param}")
        yield Path(request.param)
        return
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "disk"], capture_output=True
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        if request.param == "full":
            with pytest.raises(OSError), open(tmp_path / "disk" / "filler", "wb", buffering=0) as file:
                while True:
                    assert file.write(b"x" * 4096)
        else:
            subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("kind", [*WRITERS, *FOLDERS])
def test_a_closed_place_is_told_with_its_name(closed, kind):
    before = sorted(os.listdir(closed)) if closed.name == "disk" else None
    with pytest.raises(FileError, match="new") as error:
        (WRITERS | FOLDERS)[kind](closed / "new")
    assert isinstance(error.value, NestlingError) and str(closed) in str(error.value)
    assert before is None or sorted(os.listdir(closed)) == before


def test_checks_tell_it_beforehand(closed):
    for check, path in ((check_file, closed / "x"), (check_result, closed / "x"), (check_folder, closed / "a" / "b")):
        with pytest.raises(FileError, match=str(path)):
            check(path)


def test_a_folder_whose_parents_are_missing_is_only_looked_at(tmp_path):
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "x")
    check_result(None)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["file/x", "file", "folder/" + "n" * 300, "a\0b"])
def test_folders_that_cannot_be(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    with pytest.raises(FileError):
        check_folder(path)
    with pytest.raises(FileError):
        save_results(path, GRID, {})
    assert Path("file").read_text() == "mine" and not os.listdir("folder")


@pytest.mark.parametrize("path", ["folder", "file/x", "missing/x", "n" * 300, "loop", "", "a\0b"])
@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_cannot_be(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with pytest.raises(FileError):
        check_file(path)
    with pytest.raises(FileError):
        WRITERS[kind](path)
    assert sorted(os.listdir()) == ["file", "folder", "loop"] and Path("file").read_text() == "mine"
    assert not os.listdir("folder")


def test_a_missing_folder_is_still_the_built_in_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        write_file(tmp_path / "missing" / "x", "")


@pytest.mark.parametrize("free, told", [(999, True), (1000, False)])
def test_room_is_looked_at(tmp_path, monkeypatch, free, told):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(5000, 4000, free))
    for check in (check_file, check_folder):
        if told:
            with pytest.raises(FileError, match="it takes about 0.00 MB") as error:
                check(tmp_path / "x", 1000)
            assert error.value.errno == errno.ENOSPC
        else:
            check(tmp_path / "x", 1000)


# What is there already


def test_results_replace_results(tmp_path):
    for kind in ("json", "html", "png"):
        for _ in range(2):
            check_result(tmp_path / kind)
            WRITERS[kind](tmp_path / kind)
    (tmp_path / "empty").touch()
    check_result(tmp_path / "empty")


@pytest.mark.parametrize(
    "content", [b'{"text": "my data"}\n', b"<html>my page", b"\x89PNG\r\n\x1a\nmine", b"\0" * 5000]
)
def test_a_users_file_is_no_result(tmp_path, content):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(FileError, match="mine exists, and is no result of nestling"):
        check_result(tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == content


def test_of_a_link_the_file_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real").write_text("old")
    (tmp_path / "link").symlink_to("deep/real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "real").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["real"]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes of POSIX")
def test_devices_and_pipes_are_written_into(tmp_path):
    """Replacing them, as root can, would break other programs."""
    before = os.stat("/dev/null")
    check_result("/dev/null")
    write_json("/dev/null", [], {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == before.st_ino
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe"):  # nobody reads: it is not waited for
        write_file(tmp_path / "pipe", "x")
    said = io.StringIO()
    reader = threading.Thread(target=lambda: said.write((tmp_path / "pipe").read_text()))
    reader.start()
    text = "many bytes" * 20_000  # more than a pipe holds at a time
    for _ in range(100):
        try:
            write_file(tmp_path / "pipe", text)
            break
        except FileError:  # the reader is not there yet
            threading.Event().wait(0.1)
    reader.join(10)
    assert said.getvalue() == text and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="there is no /dev/fd")
def test_a_file_that_is_open_is_written_into(tmp_path):
    """As with `--json /dev/stdout > file`: what was printed stays."""
    with open(tmp_path / "out", "w") as file:
        file.write("a table\n")
        file.flush()
        check_result(f"/dev/fd/{file.fileno()}")
        write_file(f"/dev/fd/{file.fileno()}", "results\n")
    assert (tmp_path / "out").read_text() == "a table\nresults\n"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write everywhere")
def test_a_protected_file_stays(tmp_path):
    (tmp_path / "x").write_text("mine")
    (tmp_path / "x").chmod(0o444)
    with pytest.raises(FileError, match="x"):
        write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "mine"
