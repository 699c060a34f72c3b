"""What a server has done, in the text format of Prometheus."""

import threading
from collections import Counter
from collections.abc import Mapping

OUTCOMES = ("answered", "refused", "busy", "gone", "failed")  # of requests
HELP = {
    "requests_total": (
        "counter",
        "Chat requests by outcome: refused ones were the client's mistake, gone clients left.",
    ),
    "tokens_total": ("counter", "Tokens of prompts that were read, and of answers."),
    "generation_seconds_total": ("counter", "Seconds that the worker generated."),
    "requests_waiting": ("gauge", "Requests in the line."),
    "requests_running": ("gauge", "Requests that are being answered."),
    "cache_bytes": ("gauge", "Bytes that the cache of the request being answered holds."),
    "cache_bytes_peak": ("gauge", "The most that has been held at once."),
    "cache_full_bytes": ("gauge", "What a full cache of the same tokens would hold, in the stored precision."),
    "cache_full_bytes_peak": ("gauge", "The most that full caches would have held at once."),
}


class Metrics:
    """Counts of one server, safe to change and to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seconds = 0.0
        self.held = self.peak = self.full = self.full_peak = 0

    def ended(self, outcome: str) -> None:
        """A request had this outcome."""
        with self._lock:
            self.requests[outcome] += 1

    def generated(self, prompt: int, answer: int, seconds: float) -> None:
        """So many tokens were read and written, in that time."""
        with self._lock:
            self.tokens["prompt"] += prompt
            self.tokens["generated"] += answer
            self.seconds += seconds

    def holds(self, stored: int, full: int) -> None:
        """``stored`` bytes are held now, where a full cache would hold ``full``."""
        with self._lock:
            self.held, self.full = stored, full
            self.peak, self.full_peak = max(self.peak, stored), max(self.full_peak, full)

    def text(self, waiting: int, running: int) -> str:
        """All of them, as Prometheus reads them."""
        with self._lock:
            values: dict[str, Mapping[str, float] | float] = {
                "requests_total": {f'outcome="{name}"': self.requests[name] for name in OUTCOMES},
                "tokens_total": {f'kind="{name}"': self.tokens[name] for name in ("prompt", "generated")},
                "generation_seconds_total": round(self.seconds, 3),
                "requests_waiting": waiting,
                "requests_running": running,
                "cache_bytes": self.held,
                "cache_bytes_peak": self.peak,
                "cache_full_bytes": self.full,
                "cache_full_bytes_peak": self.full_peak,
            }
        lines = []
        for name, (kind, help) in HELP.items():
            lines += [f"# HELP nestling_{name} {help}", f"# TYPE nestling_{name} {kind}"]
            value = values[name]
            if isinstance(value, Mapping):
                lines += [f"nestling_{name}{{{label}}} {count}" for label, count in value.items()]
            else:
                lines.append(f"nestling_{name} {value}")
        return "\n".join(lines) + "\n"
