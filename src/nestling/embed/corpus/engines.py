"""Who encodes shards: this process, or several of them. A worker that is killed loses the shard it was at, no more."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.embed.corpus.shards import Shard, Work, write_shard
from nestling.errors import EncodeError

LOST = 3  # times in a row that workers may be lost before a shard is done


@dataclass(frozen=True)
class Job:
    """What workers have to know, which other processes and machines can be sent.

    Attributes:
        model, adapter: as `ElasticEncoder.from_pretrained` takes them.
        sizes: the names of those that are written.
        folder: where to; the same for all machines.
        format, dtype, batch_size: see `EncodeConfig`.
        id: checksum of what vectors depend on beside the texts.
        threads: of a worker that has a process of its own.
        graphs: folder of the ONNX graphs that encode; None where torch does.
    """

    model: Any
    adapter: Any
    sizes: tuple[str, ...]
    folder: Path
    format: str
    dtype: str
    batch_size: int
    id: str
    threads: int = 1
    graphs: Path | None = None


class Worker:
    """Encodes the texts of a shard and writes it: ``worker(work)``."""

    def __init__(self, job: Job, encoder: Any = None):
        """``encoder`` is the `ElasticEncoder` where it was loaded already; else the worker loads its own."""
        if encoder is None:
            import torch

            from nestling.embed.elastic import ElasticEncoder

            torch.set_num_threads(job.threads)
            encoder = ElasticEncoder.from_pretrained(job.model, job.sizes, adapter=job.adapter)
        self.job, self.encoder = job, encoder
        if job.graphs is not None:
            from nestling.embed.corpus.graphs import GraphEncoder

            self.encoder = GraphEncoder(encoder, job.sizes, job.graphs)

    def __call__(self, work: Work) -> Shard:
        """The shard, written.

        Raises:
            EvaluationError: a vector is not finite.
            FileError: a file cannot be written.
        """
        job = self.job
        vectors = self.encoder.encode_document(work.texts, sizes=job.sizes, batch_size=job.batch_size)
        return write_shard(job.folder, work, vectors, job.format, job.dtype, job.id)


def in_this_process(job: Job, works: Iterator[Work], encoder: Any) -> Iterator[Shard]:
    """Shards one after the other, by an encoder that is loaded."""
    worker = Worker(job, encoder)
    return (worker(work) for work in works)


def in_processes(job: Job, works: Iterator[Work], workers: int) -> Iterator[Shard]:
    """Shards as they are done, by several processes with a model each. Those of a worker that was lost are done again.

    Raises:
        EncodeError: workers are lost again and again.
    """
    again: deque[Work] = deque()
    lost = 0
    while lost < LOST:
        running: dict[Future, Work] = {}
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (job,)) as pool:
            try:
                while True:
                    while len(running) < 2 * workers and (work := _next(again, works)) is not None:
                        again.appendleft(work)  # until it is submitted
                        running[pool.submit(_encode, work)] = again.popleft()
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        shard = future.result()
                        running.pop(future)
                        lost = 0
                        yield shard
            except BrokenProcessPool:
                again.extend(running.values())
                lost += 1
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    raise EncodeError(
        f"workers were lost {LOST} times in a row without a shard done, perhaps for want of memory: take fewer "
        "workers or smaller batches; the same command goes on after the shards that are written"
    )


def _next(again: deque[Work], works: Iterator[Work]) -> Work | None:
    return again.popleft() if again else next(works, None)


_worker: list[Worker] = []  # of a process that encodes


def _start(job: Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker[:] = [Worker(job)]


def _encode(work: Work) -> Shard:
    return _worker[0](work)
