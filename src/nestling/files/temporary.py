"""Temporary files and folders that say whose they are, so that what a killed process left is removed by the next one.

The name has the machine (with its boot and its namespace of process ids), the process and when that was started. What
belongs to a process that is known to have ended is removed at once; what belongs to another machine, or to another
container, of whose processes nothing is known here, after a day without a change.
"""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

NAME = re.compile(r"\.nestling-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<start>\d{1,20})-[0-9a-f]{8}")
DAY = 86400  # seconds


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike[str], mode: int = 0o777) -> Iterator[Path]:
    """A new folder within ``parent``, which is removed unless it was renamed.

    Args:
        mode: its permissions, which the umask narrows, as those of any folder.
    """
    sweep(Path(parent))
    while True:
        folder = Path(parent) / _name()
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_file(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a new, empty file within ``parent``, which is removed unless it was renamed."""
    sweep(Path(parent))
    while True:
        path = Path(parent) / _name()
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def private_temporary_folder() -> AbstractContextManager[Path]:
    """One that nobody else can look into, where the system keeps temporary files."""
    return temporary_folder(tempfile.gettempdir(), 0o700)


def sweep(folder: Path) -> None:
    """Remove what writers that are no more have left in ``folder``. What cannot be removed is no error."""
    with contextlib.suppress(OSError):
        for name in [entry.name for entry in os.scandir(folder) if entry.name.startswith(".nestling-")]:
            path = folder / name
            with contextlib.suppress(OSError):
                if _is_left(path):
                    shutil.rmtree(path) if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()


def _name() -> str:
    pid = os.getpid()
    return f".nestling-{_machine()}-{pid}-{_started(pid) or 0}-{secrets.token_hex(4)}"


def _is_left(path: Path) -> bool:
    """Whether a path has a name of ours, is a file or folder of this user, and its process has ended."""
    found, about = NAME.fullmatch(path.name), path.lstat()
    if found is None or not (stat.S_ISDIR(about.st_mode) or stat.S_ISREG(about.st_mode)):
        return False
    if hasattr(os, "getuid") and about.st_uid != os.getuid():
        return False
    if found["machine"] != _machine():
        return time.time() - _changed(path) > DAY
    return not _is_alive(int(found["pid"]), int(found["start"]))


def _changed(path: Path) -> float:
    """When anything in a folder was last changed."""
    times = [path.lstat().st_mtime]
    for root, folders, files in os.walk(path):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):  # removed meanwhile
                times.append(os.lstat(os.path.join(root, name)).st_mtime)
    return max(times)


@cache
def _machine() -> str:
    """This machine since its last start, and the namespace in which its process ids are valid."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if it has ended, or this cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_alive(pid: int, start: int) -> bool:
    if start:  # where there is a /proc, and the number may have been given to another process
        return _started(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True
