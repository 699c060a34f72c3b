"""What has been measured so far, so that a killed measurement goes on where it stopped."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nestling.embed.encode import EvaluationError

Metrics = dict[str, dict[str, float]]


class Partial:
    """Metrics by what was measured (all STS sets together, each retrieval set), then by cup and column.

    Args:
        path: a JSON file, read now if it exists and replaced atomically by `put`; None keeps everything in memory.
        job: what the numbers depend on (weights, cups, prompts, data), plain JSON values.

    Raises:
        EvaluationError: the file is damaged, or was written for another ``job``.
    """

    def __init__(self, path: str | os.PathLike[str] | None, job: Mapping[str, Any]):
        self.path, self.job = None if path is None else Path(path), json.loads(json.dumps(job))
        self.done: dict[str, Metrics] = {}
        if self.path is not None and self.path.exists():
            try:
                stored = json.loads(self.path.read_text("utf-8"))
                theirs, self.done = stored["job"], dict(stored["done"])
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{self.path.name} is damaged ({error}): delete it to start again") from error
            if theirs != self.job:
                differ = ", ".join(key for key in self.job if theirs.get(key) != self.job[key])
                raise EvaluationError(f"{self.path.name} is of another measurement ({differ} differ): delete it")

    def put(self, part: str, metrics: Metrics) -> None:
        self.done[part] = metrics
        if self.path is not None:
            new = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
            new.write_text(json.dumps({"job": self.job, "done": self.done}), "utf-8")
            os.replace(new, self.path)


def checksum(value: Any) -> int:
    """CRC-32 of a module's weights, or of anything that JSON can hold."""
    if isinstance(value, nn.Module):
        total = 0
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            total = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), total))
        return total
    return zlib.crc32(json.dumps(value).encode())


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().float().contiguous().numpy().data
