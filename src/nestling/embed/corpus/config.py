"""Options of encoding a corpus."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.options import choice, shown, whole

FORMATS, DTYPES = ("parquet", "npy"), ("float16", "int8")
ENGINES = ("local", "processes")
BACKENDS = ("torch", "onnx", "onnx-int8")


def _engine(name: str, value: Any) -> Any:
    if value in ENGINES or callable(value):
        return value
    raise OptionError(f"{name}={shown(value)} is unknown: expected one of {', '.join(ENGINES)}, or a function")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Config):
    """Options of `encode_corpus`.

    Attributes:
        format: ``"parquet"``: a file a shard, with a column ``id`` and one for each size; ``"npy"``: an array a size
            and shard, which can be mapped into memory.
        dtype: ``"float16"``, or ``"int8"``: each vector times what makes its largest number 127; its length, which
            cosines do not need, is brought back to 1 by readers.
        shard_rows: texts a file; what a killed run loses at most, for each of its workers.
        batch_size: texts in a forward.
        backend: what runs the model: ``"torch"``; ``"onnx"``: ONNX Runtime, on processors, with the same vectors up to
            rounding; or ``"onnx-int8"``: with weights in 8 bits, with vectors that are close, and faster still.
        engine: ``"local"``: this process; ``"processes"``: several on this machine; or a function
            ``engine(job, works, workers)`` that yields shards, such as `nestling.integrations.ray.ray_engine`.
        workers: processes or actors; by default as many as there are processors.
    """

    format: str = option("parquet", "parquet or npy.", partial(choice, known=FORMATS))
    dtype: str = option("float16", "float16 or int8.", partial(choice, known=DTYPES))
    shard_rows: int = option(10_000, "Texts a file.", whole)
    batch_size: int = option(64, "Texts in a batch.", whole)
    backend: str = option("torch", "torch, onnx or onnx-int8.", partial(choice, known=BACKENDS))
    engine: str | Callable[..., Any] = option("local", "local or processes.", _engine, cli=False)
    workers: int | None = option(None, "Processes, or actors of Ray; default: the processors.", whole)

    @property
    def worker_count(self) -> int:
        """The workers that are asked for, or as many as there are processors for this process."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
