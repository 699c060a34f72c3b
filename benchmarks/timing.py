"""Times that can be compared: the jobs take turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def medians(jobs: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each job over that many turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}
