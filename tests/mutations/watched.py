"""Cases that run in a process of their own: one that hangs, takes much memory or dies is told of, and ends alone."""

import multiprocessing
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of the processor, or of waiting for something
PATIENCE = 120.0  # in all, on a machine that is busy
MEMORY = 1 << 30  # bytes above what the process had


def watched(cases: Sequence[Any], run: Callable[[Any, Callable[[str], None]], str]) -> list[str]:
    """What ``run`` says of each case, or why it did not get so far: ``"hang"``, ``"memory"``, ``"died"``.

    Args:
        run: given a case, and a function to tell what it is about, before it is tried.
    """
    found: list[str] = []
    while len(found) < len(cases):
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = os.fork()
        if not child:
            _serve(cases[len(found) :], run, theirs)
        theirs.close()
        try:
            while len(found) < len(cases):
                found.append(_next(ours, child))
                if found[-1].startswith(("hang", "died")):
                    break
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ours.close()
    return found


def _serve(cases: Sequence[Any], run: Callable[[Any, Callable[[str], None]], str], pipe: Any) -> None:
    try:
        used = _status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MEMORY,) * 2)
        for case in cases:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
            before = _status("VmRSS")
            said = run(case, lambda about: pipe.send((about,)))
            above = _status("VmHWM") - before
            pipe.send(f"memory: {above >> 20} MiB, {said}" if above > MEMORY else said)
        os._exit(0)
    except BaseException:
        pipe.send(f"died: {traceback.format_exc()}")
        os._exit(1)


def _next(pipe: Any, child: int) -> str:
    """What a case said. A tuple is what it is about."""
    start = moved = time.monotonic()
    busy = last = _processor(child)
    about = ""
    while True:
        if pipe.poll(0.05):
            try:
                said = pipe.recv()
            except EOFError:
                return f"died: {about}"
            if isinstance(said, str):
                return said
            about = said[0]
            continue
        now, spent = time.monotonic(), _processor(child)
        if spent is None or busy is None:
            return f"died: {about}"
        if spent != last:
            last, moved = spent, now
        waits = now - moved > SECONDS and _state(child) in "SD"  # for a pipe, say
        if spent - busy > SECONDS or waits or now - start > PATIENCE:
            return f"hang: {about}: {spent - busy:.1f} s of the processor, {now - start:.1f} s in all"


def _processor(pid: int) -> float | None:
    """Seconds of the processor that a process has used; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _status(name: str) -> int:
    """Bytes of this process, by the name that Linux has for them."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
