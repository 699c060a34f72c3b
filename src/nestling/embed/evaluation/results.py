"""Results of a `GridEvaluator` as files: the table, a heat map of the grid, quality against cost, a model card's part.

Everything works on the evaluator's flat rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nestling.embed.evaluation.metrics import BESIDE
from nestling.embed.ladder import Size
from nestling.files.writing import check_folder, naming, write_file
from nestling.report.figures import Scale, curve, heat_maps, write_png
from nestling.report.results import run_meta, write_json
from nestling.report.tables import markdown_table

Row = Mapping[str, Any]
MEANS = {"mean_sts": "STS, mean Spearman", "mean_ndcg": "retrieval, mean nDCG@10"}
FLOPS = "share of the FLOPs of the deepest size's transformer (layers)"


def save_results(folder: str | Path, rows: Sequence[Row], meta: Mapping[str, Any] | None = None) -> list[Path]:
    """Write ``grid.json`` (rows and how they were made), ``grid.md``, ``grid.png`` and ``cost.png``.

    Args:
        folder: made if it is not there; files of those names are replaced.
        rows: as from `GridEvaluator.rows`; of several methods, one after the other.
        meta: by default what `run_meta` knows.

    Returns:
        The files.

    Raises:
        FileError: they cannot be written.
    """
    check_folder(folder)
    folder = Path(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("grid.json", "grid.md", "grid.png", "cost.png")]
    write_json(files[0], rows, run_meta() if meta is None else meta)
    write_file(files[1], markdown(rows))
    write_png(files[2], grid_figure(rows))
    write_png(files[3], cost_figure(rows))
    return files


def grid_figure(rows: Sequence[Row], column: str | None = None) -> Figure:
    """A heat map of layers by dims for each method; cells that were not measured are grey.

    Args:
        column: what is shown; by default the mean of STS, or of nDCG where there is no STS.
    """
    column = column or _means(rows)[0]
    depths, dims = (sorted({getattr(Size.parse(row["size"]), side) for row in rows}) for side in ("layers", "dims"))
    panels: dict[str, list[list[Any]]] = {}
    for row in rows:
        cells = panels.setdefault(_line(row, rows), [[None] * len(dims) for _ in depths])
        size = Size.parse(row["size"])
        cells[depths.index(size.layers)][dims.index(size.dims)] = row.get(column)
    return heat_maps(
        panels,
        title=f"Quality of every size: {MEANS.get(column, column)}",
        row_label="layers",
        col_label="dims",
        row_names=[str(depth) for depth in depths],
        col_names=[str(width) for width in dims],
    )


def cost_figure(
    rows: Sequence[Row],
    column: str | None = None,
    *,
    costs: Mapping[str, float] | None = None,
    label: str = FLOPS,
) -> Figure:
    """Quality against what encoding costs, a line a method.

    Dims cost nothing to encode: of several sizes of one depth the widest is drawn.

    Args:
        column: what is shown; by default the mean of STS, or of nDCG where there is no STS.
        costs: measured cost by the size's name, with ``label`` saying what was measured. By default the share of the
            transformer's FLOPs: a size's layers over those of the deepest size. Embedding lookup, pooling and
            tokenisation are not in it.
    """
    column = column or _means(rows)[0]
    widest: dict[tuple[str, int], tuple[Size, Row]] = {}
    for row in rows:
        size = Size.parse(row["size"])
        best = widest.setdefault((_line(row, rows), size.layers), (size, row))
        if size.dims > best[0].dims:
            widest[_line(row, rows), size.layers] = (size, row)
    deepest = max(layers for _, layers in widest)
    points = [
        {
            "cost": size.layers / deepest if costs is None else costs[size.name],
            "quality": row.get(column),
            "line": _line(row, rows),
        }
        for size, row in widest.values()
    ]
    what = MEANS.get(column, column)
    return curve(points, Scale("cost", label), Scale("quality", what), "line", f"{what} by cost")


def markdown(rows: Sequence[Row], columns: Iterable[str] | None = None) -> str:
    """The rows as a Markdown table for a model card, metrics (correlations, nDCG, recall, agreement) x 100.

    Args:
        columns: which are shown, in order; by default all that have a value in some row.
    """
    if columns is None:
        columns = dict.fromkeys(key for row in rows for key in row if row[key] not in ("", None))
    shown = list(columns)
    return markdown_table([{key: _shown(key, row.get(key)) for key in shown} for row in rows])


def _shown(key: str, value: Any) -> Any:
    return round(100 * value, 2) if isinstance(value, float) and key not in BESIDE else value


def _line(row: Row, rows: Sequence[Row]) -> str:
    """What tells a row's line from others: its method, and its model where there are several."""
    several = len({other.get("model") for other in rows}) > 1
    parts = [row.get("method"), row.get("model") if several or not row.get("method") else None]
    return ", ".join(str(part) for part in parts if part) or "model"


def _means(rows: Sequence[Row]) -> list[str]:
    return [column for column in MEANS if any(column in row for row in rows)]
