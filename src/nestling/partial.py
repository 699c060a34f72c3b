"""What has been measured so far, so that a killed measurement goes on where it stopped. Shared by both wings."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestling.errors import EvaluationError
from nestling.writing import check_file, write_file


class Partial:
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
        if self.path is not None and self.path.exists():
            try:
                stored = json.loads(self.path.read_text("utf-8"))
                theirs, self.done = dict(stored["job"]), dict(stored["done"])
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{self.path.name} is damaged ({error}): delete it to start again") from error
            if theirs != self.job:
                names = sorted({*theirs, *self.job})
                differ = ", ".join(name for name in names if theirs.get(name) != self.job.get(name))
                raise EvaluationError(f"{self.path.name} is of another job ({differ} differ): delete it")

    def save(self) -> None:
        if self.path is not None:
            write_file(self.path, json.dumps({"job": self.job, "done": self.done}))
