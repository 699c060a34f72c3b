"""The size that fits a need, by what was measured of every size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nestling.embed.ladder import Cup, Ladder
from nestling.errors import OptionError

Row = Mapping[str, Any]
QUALITIES = ("mean_sts", "mean_ndcg")


def qualities(rows: Iterable[Row]) -> dict[Cup, float]:
    """The quality of each size as one number: the mean of ``mean_sts`` and ``mean_ndcg``, or else the agreement."""
    found = {}
    for row in rows:
        values = [row[name] for name in QUALITIES if isinstance(row.get(name), int | float)]
        if not values and isinstance(row.get("agreement"), int | float):
            values = [row["agreement"]]
        if values and "size" in row:
            found[Cup.parse(row["size"])] = sum(values) / len(values)
    return found


def chosen_size(
    sizes: Ladder,
    rows: Sequence[Row],
    *,
    quality: float | None = None,
    bytes: int | None = None,
    speeds: Mapping[Cup, float] | None = None,
    texts_per_second: float | None = None,
) -> Cup:
    """The cheapest size of that quality; where none is asked for, the best that is small and quick enough.

    Cheap is shallow first, since layers cost time, and then narrow.

    Args:
        rows: measured, as of `GridEvaluator.rows` or `agreement`; may be empty unless ``quality`` is given.
        quality: share of the full size's quality that has to be reached.
        bytes: of a vector, in fp32, at most.
        speeds: texts a second of each size.
        texts_per_second: at least.

    Raises:
        OptionError: no size will do, or the rows do not tell.
    """
    measured = qualities(rows)
    fitting = [size for size in sizes if bytes is None or 4 * size.dims <= bytes]
    if texts_per_second is not None:
        fitting = [size for size in fitting if (speeds or {})[size] >= texts_per_second]
    if not fitting:
        most = f"; texts a second: {_listed(speeds)}" if speeds else ""
        raise OptionError(f"no size of {sizes} is small and quick enough: ask for less{most}")
    if quality is None:
        known = [size for size in fitting if size in measured and not math.isnan(measured[size])]
        return max(known, key=measured.__getitem__) if len(known) == len(fitting) else fitting[-1]
    if sizes.full not in measured:
        raise OptionError(
            f"the rows do not have the full size {sizes.full}, whose quality is the measure: evaluate it"
        )
    least = quality * measured[sizes.full]
    good = [size for size in fitting if measured.get(size, -math.inf) >= least]
    if not good:
        shares = {size: measured[size] / measured[sizes.full] for size in fitting if size in measured}
        raise OptionError(f"no size that fits has {quality:.0%} of the full one's quality: {_listed(shares)}")
    return good[0]


def _listed(values: Mapping[Cup, float] | None) -> str:
    return ", ".join(f"{size} {value:.3g}" for size, value in (values or {}).items())
