"""Files of results: flat rows, and how they were made, written and read."""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from nestling.errors import NestlingError
from nestling.files.fields import Fields
from nestling.files.reading import read_object, short
from nestling.files.writing import version_of, write_file
from nestling.report.tables import Row


def run_meta(seconds: float | None = None) -> dict[str, Any]:
    """What it takes to repeat a run that took `seconds`; no hostname, and no folder of an absolute path, is recorded.

    `commit` is None unless git tracks this file.
    """
    versions = {package: version_of(package) for package in ("torch", "transformers", "nestling")}
    return {
        "commit": _commit(Path(__file__).resolve()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores{_gpu()}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "command": _command(sys.argv),
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _commit(file: Path) -> str | None:
    tracked, head = ("ls-files", "--error-unmatch", file.name), ("rev-parse", "--short", "HEAD")
    try:  # an installed copy may lie inside somebody else's checkout, hence the first question
        for question in (tracked, head):
            answer = subprocess.run(("git", *question), cwd=file.parent, capture_output=True, text=True, check=True)
        return answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*\S)", info.read_text() if info.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _command(argv: Sequence[str]) -> str:
    """The command line, each absolute path cut to its last part, also inside `--flag=/a/b` and `/a/b,/c/d`."""
    program = Path(argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    parts = [re.split("([=,:])", arg) for arg in argv[1:]]
    return shlex.join([name, *("".join(Path(p).name if os.path.isabs(p) else p for p in arg) for arg in parts)])


def write_json(path: str | os.PathLike[str], rows: Iterable[Row], meta: Mapping[str, Any]) -> None:
    """Write `{"rows": [...], "meta": {...}}`, one row a line, atomically; NaN and infinities become null.

    Raises FileError where it cannot be written and TypeError for a value that JSON cannot hold; an older file stays.
    """
    lines = ",\n".join(json.dumps(plain(row)) for row in rows)
    write_file(path, f'{{"rows": [\n{lines}\n],\n"meta": {json.dumps(plain(meta), indent=1)}}}\n')


def plain(value: Any) -> Any:
    """`value` in JSON's own types; arrays and tensors become numbers or lists, NaN and infinities None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def read_rows(path: str | os.PathLike[str], error: type[NestlingError]) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        error: it cannot be read, or has no flat rows.
    """
    rows = Fields(path, read_object(path, error), error).objects("rows")
    found = [dict(row.values) for row in rows]
    for number, row in enumerate(found, 1):
        if nested := [name for name, value in row.items() if isinstance(value, list | dict)]:
            raise error(f"{path}, row {number}: {short(nested[0])} must be one value, got {short(row[nested[0]])}")
    return found
