"""Checksums of the files of a folder, kept in the folder: what was damaged since is found before it is used."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from nestling.errors import FileError, NestlingError
from nestling.files.fields import Fields
from nestling.files.folders import sha256
from nestling.files.reading import check_regular, read_object
from nestling.files.writing import write_file

MANIFEST = "checksums.json"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write down the checksums of files of the folder, atomically; names are relative, with ``/`` between parts."""
    listed = sorted(names)
    sums = {name: sha256(folder / name) for name in listed}
    sizes = {name: (folder / name).stat().st_size for name in listed}
    write_file(folder / MANIFEST, json.dumps({"sha256": sums, "bytes": sizes}, indent=1) + "\n")


def check_manifest(folder: Path, error: type[NestlingError] = FileError) -> None:
    """Compare the folder's files with their checksums, if there are any.

    Raises:
        error: one is missing, or is not what it was; the message names it. Or the checksums themselves are damaged.
    """
    if bad := damaged(folder, error):
        check_regular(folder / bad[0], error)
        raise error(f"{folder / bad[0]} is damaged: it is not what was written (its checksum differs)")


def damaged(folder: Path, error: type[NestlingError] = FileError) -> list[str]:
    """The names of files that are missing, or are not what they were.

    Raises:
        error: the checksums themselves are damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return []
    fields = Fields(path, read_object(path, error), error)
    sums, sizes = fields.object("sha256"), fields.object("bytes")
    expected = {name: (sizes.whole(name), sums.text(name)) for name in sums.values}
    return [name for name, (size, checksum) in expected.items() if not _is_as(folder / name, size, checksum)]


def _is_as(path: Path, size: int, checksum: str) -> bool:
    try:
        return check_regular(path) == size and sha256(path) == checksum
    except OSError:
        return False
