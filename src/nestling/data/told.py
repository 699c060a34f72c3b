"""What a reader says beside the data: what it took for granted, and what it left out and why.

Lines go to the log "nestling.data": what may be a misunderstanding as a warning, which is seen by default, the rest as
information, which the command line shows as well.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger("nestling.data")


class Rows(list):
    """Rows that were read, a list.

    Attributes:
        left_out: how many rows, or columns of how many rows, were left out, by the reason.
    """

    def __init__(self, rows: Iterable[Any], left_out: Counter[str] | None = None):
        super().__init__(rows)
        self.left_out: Counter[str] = left_out if left_out is not None else Counter()


# Columns that nobody means to learn from.
BESIDE = {f"column {name}" for name in ("id", "_id", "idx", "index", "source", "subset", "split", "url", "lang", "")}


def tell_left_out(name: str, left_out: Counter[str], doubtful: bool = False) -> None:
    """Log one line of what was left out of a source, if anything was.

    It is a warning if a column of use is among it, or if it is ``doubtful`` in any case.
    """
    if left_out:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in left_out.most_common())
        doubtful = doubtful or any(reason.startswith("column ") and reason not in BESIDE for reason in left_out)
        logger.log(logging.WARNING if doubtful else logging.INFO, "%s: left out: %s", name, reasons)
