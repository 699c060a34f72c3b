"""Ray Data as the engine of `nestling.embed.encode_corpus`: actors with a model each write shards, which are rows."""

import os
from collections.abc import Iterator
from typing import Any

from nestling.embed.corpus.engines import Job, Worker
from nestling.embed.corpus.shards import Shard, Work
from nestling.errors import EncodeError
from nestling.files.reading import reason
from nestling.integrations.libraries import library

CPUS = 1  # of an actor


class ShardWriter:
    """An actor of Ray Data: rows of work in, rows about written shards out."""

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Batches ``{"work": [Work]}`` to ``{"shard": [Shard]}``."""
        return {"shard": [self.worker(work) for work in rows["work"]]}


def ray_engine(job: Job, works: Iterator[Work], workers: int) -> Iterator[Shard]:
    """Shards as actors of Ray Data have written them; ``EncodeConfig(engine=ray_engine)``.

    It uses the cluster that this process is connected to, or that ``RAY_ADDRESS`` names, or starts one here. All
    machines see the folder of the vectors under the same name. What an actor was at when it was killed is given to
    another one. One processor of the cluster stays free for Ray's own work: a pool that takes all of them waits for
    ever.

    Args:
        workers: actors, at most the cluster's processors less one.

    Raises:
        MissingExtraError: Ray is not installed.
        EncodeError: the cluster has a single processor, or an actor fails for a reason of its own.
    """
    ray = library("ray", "ray")
    data = library("ray.data", "ray")
    if not ray.is_initialized():
        _connect(ray, workers + 1)
    free = int(ray.cluster_resources().get("CPU", 0)) - 1
    if free < 1:
        raise EncodeError("the cluster of Ray has one processor, and its own work needs that: give it two or more")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    waiting = [{"work": work} for work in works]
    if not waiting:
        return
    rows = data.from_items(waiting, override_num_blocks=len(waiting))
    written = rows.map_batches(
        ShardWriter, fn_constructor_args=(job,), batch_size=1, num_cpus=CPUS,
        compute=data.ActorPoolStrategy(size=min(workers, free, len(waiting))),
    )  # fmt: skip
    try:
        for row in written.iter_rows():
            yield row["shard"]
    except ray.exceptions.RayError as error:
        raise EncodeError(
            f"Ray gave up [{reason(error)}]; the same command goes on after the shards that are written"
        ) from error


def _connect(ray: Any, processors: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" not in os.environ:  # without an address Ray would join whatever another user has started here
        options |= {"address": "local", "num_cpus": processors, "include_dashboard": False}
    ray.init(**options)
