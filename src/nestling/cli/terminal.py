"""What commands share: the console, options, errors as messages, tables and files of results."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nestling.errors import FileError

console = Console()

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or the alias smollm2.", metavar="MODEL")]
Text = Annotated[
    str | None, typer.Option(help=".txt or .jsonl file (or .gz), or a datasets name; default: built-in English pages.")
]
Encoder = Annotated[str, typer.Argument(help="Hub id, folder, or the alias minilm.", metavar="MODEL")]
Cups = Annotated[
    str | None,
    typer.Option(help="Ladder, such as 2x32,4x64,6x128; default: the one it was trained for, or one for its shape."),
]
Html = Annotated[Path | None, typer.Option(help="Write a report page to this file.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write {rows, meta} to this file.")]


def errors_as_messages(command: Callable) -> Callable:
    """Expected errors (bad input, missing files) end the command with one line, not with a traceback."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error

    return run


def loading(load: Callable, model: str) -> Any:
    with console.status(f"loading {model}"):
        return load(model)


def show(rows: list[dict], title: str) -> None:
    from nestling.report import table

    console.print(table([{k: v for k, v in r.items() if k != "model"} for r in rows], title=title))


def check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise FileError(f"the folder of {path} does not exist: make it first")


def write_results(path: Path | None, rows: list[dict], seconds: float | None = None) -> None:
    if path is not None:
        from nestling.report import run_meta, write_json

        write_json(path, rows, run_meta(seconds))
        console.print(f"Results: {path}")


def write_curve(model: str, trained: Any, json: Path | None, html: Path | None, what: str) -> None:
    """The curve of an encoder's training, as JSON and as a page, where they are wanted."""
    info = trained.info
    write_results(json, [{"model": model, **point} for point in info["curve"]], info["seconds"])
    if html is not None:
        from nestling.embed.pages import write_training

        write_training(html, trained, title=f"{model}: {what}")
        console.print(f"Report: {html}")
