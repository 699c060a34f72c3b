"""Folders of results that appear whole or not at all, in which nothing but files of ours is ever replaced.

A new folder is filled beside its place and renamed. In one that exists, perhaps with a user's files in it, files can
only be replaced one by one. So that a reader finds either the old or the new artefact at any moment, also after the
writer was killed, one file of it, the head, has the checksums of others, the sealed ones. New sealed files are first
put beside the old ones under names made of their checksums (`waiting`); then the head is replaced, in one rename, and
with it the artefact; then the sealed files take their places. `read_sealed` looks in both, and the next writer
finishes what a killed one has begun.
"""

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nestling.errors import FileError
from nestling.files.temporary import sweep, temporary_folder
from nestling.files.writing import check_folder, naming, sync, sync_tree

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """Names of files of an artefact: the head has the checksums, in hexadecimal digits, of the sealed ones."""

    head: str
    sealed: tuple[str, ...]


def write_folder(folder: Path, fill: Callable[[Path], T], over: Parts | None = None) -> T:
    """Write a folder: ``fill`` is given an empty one, which takes its place, or whose files do.

    Args:
        over: files of ours in a folder that exists are replaced, as the module says; all others stay. The caller has
            made sure that those of these names are ours. None: the folder must not exist.

    Returns:
        What ``fill`` does.

    Raises:
        FileError: the folder exists and ``over`` was not given, or it cannot be written. What was there is as it was.
    """
    place = Path(os.path.realpath(folder))
    check_folder(folder)
    if place.exists():
        if over is None:
            raise FileError(f"{folder} exists: choose another folder, or remove it")
        return _fill_old(folder, place, fill, over)
    with naming(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), temporary_folder(place.parent) as new:
        found = fill(new)
        _finish(new)
        try:
            new.rename(place)
            sync(place.parent)
        except OSError:
            if over is None or not place.is_dir():
                raise
            with _alone(place):  # somebody else has been faster
                _commit(new, place, over)
        return found


def _fill_old(folder: Path, place: Path, fill: Callable[[Path], T], over: Parts) -> T:
    with naming(folder):
        sweep(place.parent)  # of writers that were killed before the folder was there
        with _alone(place):
            _settle(place, over)
        with temporary_folder(place) as new:
            found = fill(new)
            _finish(new)
            with _alone(place):
                _commit(new, place, over)
        return found


def _finish(new: Path) -> None:
    """Sync all files, with the permissions of any new file: safetensors makes some readable by their owner alone."""
    mode = stat.S_IMODE(new.stat().st_mode) & 0o666
    for path in new.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    sync_tree(new)


def _commit(new: Path, folder: Path, parts: Parts) -> None:
    """Put the files of ``new`` into a folder."""
    files = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    for file in files:
        if file != parts.head and file not in parts.sealed:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (new / file).replace(folder / file)
    aside = []
    try:
        for file in files:
            if file in parts.sealed:
                aside.append(waiting(folder / file, sha256(new / file)))
                (new / file).replace(aside[-1])
        sync(folder)
        (new / parts.head).replace(folder / parts.head)
    except OSError:
        for path in aside:
            path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # they are found where they are as well
        sync(folder)
        _settle(folder, parts)


def _settle(folder: Path, parts: Parts) -> None:
    """Let sealed files that the head speaks of take their places; others are of writers that were killed before."""
    head = folder / parts.head
    spoken = head.read_text("utf-8", errors="replace") if head.is_file() else ""
    for name in parts.sealed:
        for path in [path for path in folder.iterdir() if _is_waiting(path, name)]:
            if sha256(path) in spoken:
                path.replace(folder / name)
            else:
                path.unlink()
    sync(folder)


def waiting(path: Path, checksum: str) -> Path:
    """Where a file is that has been written, and has not taken its place yet."""
    return path.with_name(f".{path.stem}.{checksum[:16]}{path.suffix}")


def _is_waiting(path: Path, name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    found = re.fullmatch(rf"\.{re.escape(stem)}\.[0-9a-f]{{16}}{re.escape(suffix)}", path.name)
    return found is not None and path.is_file() and not path.is_symlink()


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sealed(path: Path, checksum: str) -> bytes | None:
    """The content of a sealed file; None if what is there has another checksum.

    Raises:
        FileNotFoundError: it is not there.
    """
    aside = waiting(path, checksum)
    for place in (path, aside, path):  # the last time for one that took its place meanwhile
        with contextlib.suppress(FileNotFoundError):
            content = place.read_bytes()
            if hashlib.sha256(content).hexdigest() == checksum:
                return content
    if not path.exists():
        raise FileNotFoundError(path)
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time puts files into a folder, where the file system can see to that."""
    try:
        import fcntl

        number = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        for _ in range(100):  # 10 s: another one takes milliseconds, unless it was stopped
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        os.close(number)
