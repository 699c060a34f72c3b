"""Times that can be compared: the jobs take turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key")


def medians(
    jobs: Mapping[Key, Callable[[], Any]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Median seconds of each job over that many turns, after one that does not count."""
    seconds: dict[Key, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            start = clock()
            job()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}
