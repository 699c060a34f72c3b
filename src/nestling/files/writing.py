"""Files that are written whole or not at all, and places that are looked at before the work is done.

Every failure to write is a FileError that names the path and says what to do.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from nestling.errors import FileError, MissingFolderError
from nestling.files.temporary import temporary_file

RESULTS, MARK = b'{"rows": [', b"nestling"  # how results in JSON start; what pages and figures have near their start
OPEN = ("/dev/std", "/dev/fd/", "/proc/")  # names of files that a process has open, such as /dev/stdout

ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that can be written to",
    errno.EPERM: "choose a place that can be written to",
    errno.ENOTDIR: "a part of it is a file, choose another place",
    errno.EISDIR: "it is a folder, choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever keeps the body from writing into a FileError that names ``path``."""
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        # safetensors has its own class, and a name with a zero byte in it is a ValueError.
        if isinstance(error, ValueError) and "null byte" not in str(error):
            raise
        raise _error(path, error) from error


def _error(path: str | os.PathLike[str], error: Exception) -> FileError:
    code = getattr(error, "errno", None)
    if code is None and "No space left" in str(error):
        code = errno.ENOSPC
    reason = getattr(error, "strerror", None) or str(error)
    made = FileError(f"cannot write {os.fspath(path)} ({reason}): {ADVICE.get(code or 0, 'choose another place')}")
    made.errno = code
    return made


def write_file(path: str | os.PathLike[str], content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file whole or not at all; an older one of that name is replaced. Devices and pipes are written into.

    Args:
        content: bytes, or text for UTF-8; lone surrogates in it, as names of files have them, are written as escapes.
            Or a function that writes to the path it is given; not for devices and pipes.

    Raises:
        FileError: it cannot be written, or the folder does not exist.
    """
    with naming(path):
        _check_target(path)
        if _is_stream(path):
            if callable(content):
                raise FileError(f"cannot write {os.fspath(path)}: it is a device or a pipe: choose a file")
            return _write_into(path, content)
        target = Path(os.path.realpath(path))  # of a link, what it leads to
        with temporary_file(target.parent) as new:
            if callable(content):
                content(new)
            elif isinstance(content, str):
                new.write_text(content, encoding="utf-8", errors="backslashreplace")
            else:
                new.write_bytes(content)
            sync(new)
            new.replace(target)
        sync(target.parent)


def sync(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk: a crash of the machine must not lose them."""
    if os.name == "nt":  # where this takes a file that is open for writing
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not know this for folders
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """`sync` for everything in a folder, and for the folder."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def check_file(path: str | os.PathLike[str] | None, nbytes: int = 0) -> None:
    """Whether a file can be written, before the work whose result it is to hold: by writing another one beside it.

    Args:
        path: None is for no file at all, and is fine.
        nbytes: that will be needed.

    Raises:
        FileError: it is a folder, its own folder does not exist or cannot be written to, or there is no room.
    """
    if path is None:
        return
    with naming(path):
        _check_target(path)
        if not _is_stream(path):
            _probe(path, Path(os.path.realpath(path)).parent, nbytes)


def check_result(path: str | os.PathLike[str] | None) -> None:
    """`check_file`, and that an existing file is one that an earlier run wrote: a user's own is not replaced.

    Raises:
        FileError: as `check_file`, or there is a file that is not empty and not of nestling.
    """
    check_file(path)
    if path is None or _is_stream(path) or not os.path.exists(path):
        return
    with naming(path), open(path, "rb") as file:
        head = file.read(1000)
    if head and not head.startswith(RESULTS) and MARK not in head:
        raise FileError(f"{os.fspath(path)} exists, and is no result of nestling: choose another name, or remove it")


def check_folder(path: str | os.PathLike[str] | None, nbytes: int = 0) -> None:
    """Whether a folder, perhaps with others around it, can be made or written to, before the work for it is done.

    Args:
        path: None is for no folder at all, and is fine.
        nbytes: that will be needed.

    Raises:
        FileError: it, or one around it, is a file or cannot be written to, or there is no room.
    """
    if path is None:
        return
    with naming(path):
        _check_name(path)
        place = Path(os.path.realpath(path))
        if os.path.lexists(place) and not place.is_dir():
            raise FileError(
                f"cannot write {os.fspath(path)}: it is a file, and a folder is needed; choose another name"
            )
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise FileError(f"cannot write {os.fspath(path)}: {place} is a file: choose another folder")
        _probe(path, place, nbytes)


def _probe(path: str | os.PathLike[str], folder: Path, nbytes: int) -> None:
    with temporary_file(folder) as probe, open(probe, "wb") as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        made = FileError(
            f"cannot write {os.fspath(path)}: it takes about {_size(nbytes)}, and {_size(free)} are free; make room "
            "there, or choose another place"
        )
        made.errno = errno.ENOSPC
        raise made


def is_full(folder: Path) -> bool:
    """Whether a disk has no room left, as it is when a large file did not fit."""
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _check_target(path: str | os.PathLike[str]) -> None:
    """What can be known of a file's path without writing."""
    name = os.fspath(path)
    if not name:
        raise FileError("cannot write a file without a name: give one")
    _check_name(path)
    if os.path.isdir(path):
        raise FileError(f"cannot write {name}: it is a folder: choose another name")
    folder = Path(os.path.realpath(path)).parent
    if not folder.exists():
        raise MissingFolderError(f"cannot write {Path(path).name}: the folder {folder} does not exist: make it first")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


def _check_name(path: str | os.PathLike[str]) -> None:
    """Names that are too long, loops of links, and zero bytes are an OSError or a ValueError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether there is a device, a pipe or what is open already: what has to be written into, never replaced."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode) or os.path.abspath(path).startswith(OPEN)
    except OSError:
        return False


def _write_into(path: str | os.PathLike[str], content: str | bytes) -> None:
    number = os.open(
        path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
    )  # a pipe that nobody reads is an error then
    os.set_blocking(number, True)
    with open(number, "wb") as file:
        file.write(content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)


def version_of(package: str) -> str | None:
    """The version of an installed package, as files name it; None where it is not installed, as in a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
