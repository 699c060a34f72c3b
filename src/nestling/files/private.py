"""A folder that belongs to this user alone, for code that is loaded: whoever can write to it can run what he likes."""

import contextlib
import os
import stat
from pathlib import Path

from nestling.errors import FileError


def private_folder(path: Path) -> Path:
    """Make a folder with mode 0700, or check that one is ours, and that nobody else can put another in its place.

    Args:
        path: absolute.

    Returns:
        The folder without links in its path.

    Raises:
        FileError: it cannot be made, is a link or of another user, or others can write to it or to one around it.
    """
    place = Path(os.path.realpath(path.parent)) / path.name
    try:
        _make(place)
        about = place.lstat()
        if not stat.S_ISDIR(about.st_mode):
            raise FileError(f"{place} is not a folder (links are not followed): remove it")
        if os.name == "posix":
            _check(place, about)
            if stat.S_IMODE(about.st_mode) != 0o700:
                place.chmod(0o700)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{place} cannot be made or looked at ({error.strerror or error})") from error
    return place


def _make(folder: Path) -> None:
    """The folder and those around it that are missing, all of them private."""
    missing = [folder]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)


def _check(folder: Path, about: os.stat_result) -> None:
    if about.st_uid != os.geteuid():
        raise FileError(f"{folder} is of another user (number {about.st_uid}): remove it")
    if _others_write(about):
        raise FileError(f"others can write to {folder}, and may have done so: remove it")
    for parent in folder.parents:
        found = parent.stat()
        if found.st_uid not in (0, os.geteuid()):
            raise FileError(f"{parent} is of another user (number {found.st_uid})")
        # With the sticky bit, as /tmp has it, others can add names, but cannot take away those that are ours.
        if _others_write(found) and not found.st_mode & stat.S_ISVTX:
            raise FileError(f"others can write to {parent}: chmod go-w it")


def _others_write(about: os.stat_result) -> bool:
    by_group = about.st_mode & stat.S_IWGRP and not _is_own_group(about.st_gid)
    return bool(by_group or about.st_mode & stat.S_IWOTH)


def _is_own_group(number: int) -> bool:
    """Whether a group has the name of this user, who is its only member, as many systems set users up."""
    try:
        import grp
        import pwd

        name, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except (ImportError, KeyError):
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}
