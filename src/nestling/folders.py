"""Folders that appear whole or not at all. Shared by both wings."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def write_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Write a folder whole or not at all: ``fill`` is given an empty one beside it, which then takes its place.

    A folder of that name is replaced, and put back if that fails. Returns what ``fill`` does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()  # with the permissions of any folder; those of a temporary one are private
        found = fill(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        return found
    finally:
        shutil.rmtree(work, ignore_errors=True)
