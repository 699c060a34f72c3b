"""What belongs to one visitor: caches, a corpus and what is shown, dropped when the visitor leaves."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

MOST = 16  # visitors whose caches are kept: who came first is forgotten first, and reads anew


@dataclass(eq=False)
class Session:
    """One visitor's things.

    Attributes:
        reading: the document that was read, with its caches.
        corpus: the visitor's own texts, with their indexes.
        shown: parts of the page by name, so that an error changes nothing but the line that says it.
    """

    reading: Any = None
    corpus: Any = None
    shown: dict[str, str] = field(default_factory=dict)


class Sessions:
    """The visitors who are there, by the hash that Gradio gives each opened page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._there: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._there)

    def of(self, request: Any) -> Session:
        """The session of a request; a new one for a new visitor."""
        with self._lock:
            session = self._there.setdefault(request.session_hash, Session())
            self._there.move_to_end(request.session_hash)
            while len(self._there) > MOST:
                self._there.popitem(last=False)
            return session

    def forget(self, request: Any) -> None:
        """A visitor has left: what was kept is dropped."""
        with self._lock:
            self._there.pop(request.session_hash, None)
