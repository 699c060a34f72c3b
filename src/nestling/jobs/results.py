"""What has been measured so far, so that a killed measurement goes on where it stopped. Shared by both wings."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nestling.errors import EvaluationError
from nestling.files.fields import Fields
from nestling.files.reading import read_object, short
from nestling.files.writing import check_file, write_file


class ResultStore:
    """Results by a text key that says what was measured on what: ``done``. With a file, a killed job goes on.

    Args:
        path: a JSON file, read now if it exists and replaced atomically by `save`; None keeps everything in memory.
        job: what else the numbers depend on (model, calibration, prompts, ...), plain JSON values.

    Raises:
        FileError: if the file cannot be written.
        EvaluationError: if the file is damaged, or was written by a job with another ``job``.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, job: Mapping[str, Any] | None = None):
        check_file(path)
        self.path, self.job = None if path is None else Path(path), json.loads(json.dumps(job or {}))
        self.done: dict[str, Any] = {}
        if self.path is not None and os.path.lexists(self.path):
            stored = read_object(self.path, EvaluationError, finite=False)  # a correlation may be undefined
            try:
                fields = Fields(self.path, stored, EvaluationError)
                theirs, self.done = dict(fields.object("job").values), dict(fields.object("done").values)
                checksum = fields.text("sha256", default=None)
            except EvaluationError as error:
                raise self._damaged(error) from error
            if checksum not in (None, self._checksum(theirs)):
                raise self._damaged("its numbers are not those that were written")
            if theirs != self.job:
                names = sorted({*theirs, *self.job})
                differ = ", ".join(name for name in names if theirs.get(name) != self.job.get(name))
                raise EvaluationError(f"{self.path} is of another job ({differ} differ): delete it")

    def save(self) -> None:
        if self.path is not None:
            stored = {"sha256": self._checksum(self.job), "job": self.job, "done": self.done}
            write_file(self.path, json.dumps(stored))

    def numbers(self, key: str, length: int) -> list[float]:
        """That many numbers of a key that is done; EvaluationError if it has something else."""
        found = self.done[key]
        if not isinstance(found, list) or len(found) != length or not all(map(_is_measured, found)):
            raise self._damaged(f"{short(key)} must be {length} numbers, got {short(found)}")
        return found

    def columns(self, key: str, names: Iterable[str]) -> dict[str, dict[str, float]]:
        """The columns by name of a key that is done; EvaluationError if it has something else."""
        found = self.done[key]
        for name in names:
            columns = found.get(name) if isinstance(found, dict) else None
            if not isinstance(columns, dict) or not all(map(_is_measured, columns.values())):
                raise self._damaged(f"{short(key)} must have numbers of {name}, got {short(columns)}")
        return found

    def _damaged(self, why: Any) -> EvaluationError:
        return EvaluationError(f"{self.path} is damaged ({why}): delete it to start again")

    def _checksum(self, job: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps([job, self.done]).encode()).hexdigest()


def _is_measured(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
