"""The command ``nestling embed export``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.terminal import (
    Cups,
    Encoder,
    Json,
    check_outputs,
    console,
    errors_as_messages,
    loading,
    show,
    write_results,
)
from nestling.errors import DataError, OptionError


@errors_as_messages
def export(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="New folder, of the cup; of several, each gets its own within it.")],
    cup: Annotated[
        list[str] | None, typer.Option(help="Such as 6x128; may be repeated; default: all of the ladder.")
    ] = None,
    cups: Cups = None,
    onnx: Annotated[bool, typer.Option(help="Also write an ONNX graph.")] = False,
    int8: Annotated[bool, typer.Option(help="Also write an ONNX graph with int8 weights.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Results of `embed eval --json`, for the model card's table.")
    ] = None,
    json: Json = None,
) -> None:
    """Write cups of MODEL as models of their own, all or none, checked against it, which any server loads."""
    from nestling import embed
    from nestling.files.folders import write_folder

    check_outputs(json, folder=out, new=True)
    encoder = loading(embed.load_encoder, model)
    ladder, projections = ladder_of(model, cups, encoder)
    given = cups is not None or embed.load_ladder(model) is not None
    sizes = list(ladder) if not cup else [ladder.cup(name) if given else embed.Cup.parse(name) for name in cup]
    rows = [] if results is None else _rows(results, model, [size.name for size in sizes])

    def write(size: Any, folder: Path) -> dict[str, Any]:
        with console.status(f"writing {size}"):
            found = embed.export(
                encoder, size, folder, ladder=ladder, projections=projections, rows=rows,
                onnx=onnx or int8, int8=int8,
            )  # fmt: skip
        checks = {name: getattr(found, name) for name in ("difference", "onnx_difference", "int8_cosine")}
        row = {"model": model, "cup": size.name, "folder": folder.name, "MB": found.nbytes / 1e6}
        return row | {"vector_bytes": 4 * size.dims} | {k: v for k, v in checks.items() if v is not None}

    start = time.perf_counter()
    if len(cup or ()) == 1:
        written = [write(sizes[0], out)]
    else:
        written = write_folder(out, lambda new: [write(size, new / size.name) for size in sizes])
    show(written, f"{model}: exported cups, and how far they are from it")
    console.print(f"Saved to {out}")
    write_results(json, written, time.perf_counter() - start)


def ladder_of(model: str, cups: str | None, encoder: Any, projected: bool = True) -> tuple[Any, dict[int, Any]]:
    """The cups asked for, or those the model was trained for, or some for its shape; and its projections."""
    from nestling import embed
    from nestling.embed.model.parts import Encoder as Parts

    parts = Parts.of(encoder)
    own = embed.load_ladder(model)
    ladder = embed.Ladder.parse(cups) if cups else own or embed.Ladder.default(parts.depth, parts.dims)
    projections = embed.load_projections(model) if projected else {}
    if own and projections and (missing := sorted(set(ladder.layers) - set(own.layers))):
        raise OptionError(f"{model} was trained with projections for its own cups {own}, not for layers {missing}")
    return ladder, projections


def _rows(path: Path, model: str, cups: list[str]) -> list[dict[str, Any]]:
    """The rows of a results file that are of this model and some of these cups."""
    from nestling.report.results import read_rows

    try:
        rows = read_rows(path, DataError)
        if not all(isinstance(row.get("cup"), str) for row in rows):
            raise DataError("a row has no cup")
    except DataError as error:
        raise DataError(f"{path} holds no results of `embed eval --json` ({error})") from error
    models = sorted({str(row.get("model")) for row in rows})
    own = [row for row in rows if Path(str(row.get("model"))) == Path(model) and row["cup"] in cups]
    if not own:
        raise DataError(
            f"{path} has no results of {model} at {', '.join(cups)}, it is of {', '.join(models)}: measure it first"
        )
    return own
