"""The size that fits a need, by what was measured of every size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nestling.embed.ladder import Ladder, Size
from nestling.errors import OptionError

Row = Mapping[str, Any]
QUALITIES = ("mean_sts", "mean_ndcg")


def qualities(rows: Iterable[Row]) -> dict[Size, float]:
    """The quality of each size as one number: the mean of ``mean_sts`` and ``mean_ndcg``, or else the agreement."""
    found = {}
    for row in rows:
        values = [row[name] for name in QUALITIES if isinstance(row.get(name), int | float)]
        if not values and isinstance(row.get("agreement"), int | float):
            values = [row["agreement"]]
        if values and "size" in row:
            found[Size.parse(row["size"])] = sum(values) / len(values)
    return found


def chosen_size(
    sizes: Ladder,
    rows: Sequence[Row],
    *,
    quality: float | None = None,
    bytes: int | None = None,
    speeds: Mapping[Size, float] | None = None,
    texts_per_second: float | None = None,
) -> Size:
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
        raise OptionError(
            f"no size of {sizes} is small and quick enough, and {_nearest(sizes, bytes, speeds)}: ask for less"
        )
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
        nearest = max(shares, key=shares.__getitem__, default=None)
        best = "" if nearest is None else f", the nearest is {nearest} with {shares[nearest]:.1%}"
        raise OptionError(
            f"no size that fits has {quality:.1%} of the full one's quality{best}: ask for less, or measure others"
        )
    return good[0]


def _nearest(sizes: Ladder, bytes: int | None, speeds: Mapping[Size, float] | None) -> str:
    """The narrowest and the quickest size, in words, as far as they were asked for."""
    parts = []
    if bytes is not None:
        narrow = min(sizes, key=lambda size: size.dims)
        parts.append(f"the smallest vector is that of {narrow}, {4 * narrow.dims} bytes")
    if speeds:
        quick = max(sizes, key=speeds.__getitem__)
        parts.append(f"the quickest is {quick} with {speeds[quick]:,.0f} texts a second")
    return " and ".join(parts)


def measured_speeds(encode: Callable[[tuple[int, int]], Any], sizes: Ladder, count: int) -> dict[Size, float]:
    """Texts a second at each size, from the fastest of three passes over ``count`` texts; dims cost nothing to encode.

    Args:
        encode: does a pass at a size (layers, dims).
    """
    depths = {layers: count / min(_seconds(lambda: encode((layers, 1))) for _ in range(3)) for layers in sizes.layers}  # noqa: B023
    return {size: depths[size.layers] for size in sizes}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
