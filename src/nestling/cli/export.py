"""The command ``nestling embed export``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.terminal import (
    Encoder,
    Json,
    Sizes,
    check_outputs,
    console,
    errors_as_messages,
    loaded_encoder,
    show,
    write_results,
)
from nestling.errors import DataError


@errors_as_messages
def export(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="New folder, of the size; of several, each gets its own within it.")],
    size: Annotated[
        list[str] | None, typer.Option(help="Size, such as 6x128; may be repeated; default: all that MODEL has.")
    ] = None,
    sizes: Sizes = None,
    onnx: Annotated[bool, typer.Option(help="Also write an ONNX graph.")] = False,
    int8: Annotated[bool, typer.Option(help="Also write an ONNX graph with int8 weights.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Results of `embed eval --json`, for the model card's table.")
    ] = None,
    json: Json = None,
) -> None:
    """Write sizes of MODEL as models of their own, all or none, checked against it, which any server loads."""
    from nestling.embed.ladder import Size
    from nestling.embed.model.folder import load_ladder
    from nestling.files.folders import write_folder

    check_outputs(json, folder=out, new=True)
    encoder = loaded_encoder(model, sizes, "auto")
    known = sizes is not None or encoder.adapter is not None or load_ladder(model) is not None
    wanted = [encoder.sizes.named(name) if known else Size.parse(name) for name in size or ()] or list(encoder.sizes)
    rows = [] if results is None else _rows(results, model, [each.name for each in wanted])

    def write(each: Any, folder: Path) -> dict[str, Any]:
        with console.status(f"writing {each}"):
            found = encoder.export(each, folder, rows=rows, onnx=onnx or int8, int8=int8)
        checks = {name: getattr(found, name) for name in ("difference", "onnx_difference", "int8_cosine")}
        row = {"model": model, "size": each.name, "folder": folder.name, "MB": found.nbytes / 1e6}
        return row | {"vector_bytes": 4 * each.dims} | {k: v for k, v in checks.items() if v is not None}

    start = time.perf_counter()
    if len(size or ()) == 1:
        written = [write(wanted[0], out)]
    else:
        written = write_folder(out, lambda new: [write(each, new / each.name) for each in wanted])
    show(written, f"{model}: exported sizes, and how far they are from it")
    console.print(f"Saved to {out}")
    write_results(json, written, time.perf_counter() - start)


def _rows(path: Path, model: str, sizes: list[str]) -> list[dict[str, Any]]:
    """The rows of a results file that are of this model and some of these sizes."""
    from nestling.report.results import read_rows

    try:
        rows = read_rows(path, DataError)
        if not all(isinstance(row.get("size"), str) for row in rows):
            raise DataError("a row has no size")
    except DataError as error:
        raise DataError(f"{path} holds no results of `embed eval --json` ({error})") from error
    models = sorted({str(row.get("model")) for row in rows})
    own = [row for row in rows if Path(str(row.get("model"))) == Path(model) and row["size"] in sizes]
    if not own:
        raise DataError(
            f"{path} has no results of {model} at {', '.join(sizes)}, it is of {', '.join(models)}: measure it first"
        )
    return own
