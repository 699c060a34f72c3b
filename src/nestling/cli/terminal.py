"""What commands share: the console, options, errors as messages, tables and files of results."""

import traceback
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text as Styled

from nestling.errors import AdapterError, FileError, MissingFolderError, NestlingError
from nestling.options import number, whole
from nestling.visible import visible, visible_lines


class PlainConsole(Console):
    """A console that shows strings as they are: nothing in them is markup, and control characters are spelled out."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As the parent's; strings are lines, which are not broken."""
        if any(isinstance(item, str) for item in objects):
            options = {"soft_wrap": True} | options
        super().print(*map(_plain, objects), **options)

    def status(self, status: Any, **options: Any) -> Status:
        return super().status(Styled(visible(status)) if isinstance(status, str) else status, **options)

    def rule(self, title: Any = "", **options: Any) -> None:
        super().rule(_plain(title), **options)


def _plain(item: Any) -> Any:
    return visible(item) if isinstance(item, str) else item


console, messages = PlainConsole(), PlainConsole(stderr=True)

# Checks of options, beside their help: `errors_as_messages` runs them before the command.
positive, natural = partial(whole, minimum=1), partial(whole, minimum=0)
not_negative = partial(number, minimum=0)

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or the alias smollm2.", metavar="MODEL")]
Encoder = Annotated[str, typer.Argument(help="Hub id, folder, or the alias minilm.", metavar="MODEL")]
Sizes = Annotated[
    str | None,
    typer.Option(help="Such as 2x32,4x64,6x128; default: those that MODEL was saved with, or some for its shape."),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="Its trained sizes: a folder, a hub id, or none; default: MODEL's own, or that of the package."),
]
Html = Annotated[Path | None, typer.Option(help="Write a report page to this file.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file, as JSON.")]


class _Tracebacks:
    """Whether tracebacks of expected errors are shown too; set by ``nestling --verbose``."""

    on = False


tracebacks = _Tracebacks()


def errors_as_messages(command: Callable) -> Callable:
    """The user's mistakes end a command with one line and exit code 1; what we did wrong shows where it happened.

    Options that have a check in their annotation are checked before the command runs.
    """
    checks = _checks(command)

    @wraps(command)
    def run(*args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                _check(checks, kwargs)
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):  # the last: `head` has enough
            raise
        except KeyboardInterrupt as error:
            messages.print(f"stopped{_how_to_go_on(kwargs)}", style="red", highlight=False)
            raise typer.Exit(130) from error
        except Exception as error:
            _show_error(error)
            raise typer.Exit(1) from error

    return run


def _checks(command: Callable) -> dict[str, Callable[[str, Any], Any]]:
    """The check of each parameter that has one, from its annotation."""
    hints = get_type_hints(command, include_extras=True)
    found = {
        name: [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, partial)] for name, hint in hints.items()
    }
    return {name: checks[0] for name, checks in found.items() if checks}


def _check(checks: dict[str, Callable[[str, Any], Any]], given: dict[str, Any]) -> None:
    for name, check in checks.items():
        values = given.get(name)
        for value in values if isinstance(values, list | tuple) else [values]:
            if value is not None:
                check(f"--{name.replace('_', '-')}", value)


def _show_error(error: Exception) -> None:
    short_of_memory = _short_of_memory(error)
    expected = short_of_memory or isinstance(error, NestlingError | OSError | ImportError)
    if tracebacks.on or not expected:
        messages.print(Styled(visible_lines("".join(traceback.format_exception(error)))), end="")
    text = str(error)
    if short_of_memory:
        said = text if isinstance(error, NestlingError) else f"out of memory: {text.partition(chr(10))[0]}"
        text = f"{said.rstrip(': .')}; smaller batches or shorter texts take less memory"
    if not expected:
        text = f"{type(error).__name__}: {text}"
    messages.print(f"error: {text}", style="red", highlight=False)
    if not expected:
        messages.print(
            "This is a mistake in nestling, not yours. Please report it, with the lines above and what "
            "`nestling --version -v` prints.",
            highlight=False,
        )


def _short_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, is that there is no memory left, on whatever device."""
    while error is not None:
        words = str(error).lower()
        allocating = "out of memory" in words or "allocate memory" in words or "not enough memory" in words
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and allocating):
            return True
        error = error.__cause__ or error.__context__
    return False


def _how_to_go_on(given: dict[str, Any]) -> str:
    """After an interrupt: whether and how the command can go on, where it can."""
    if "resume" not in given:
        return ""
    from nestling.jobs.checkpoints import JOB_FILE

    work = given["out"].with_name(f"{given['out'].name}-checkpoints")
    if not (work / JOB_FILE).is_file():
        return " before anything was written"
    return f": the same command with --resume goes on from the last checkpoint in {work}"


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    messages.print(f"warning: {message}", style="yellow", highlight=False)


def loading(load: Callable, model: str) -> Any:
    """Call ``load`` on a model's name while a status line is shown."""
    with console.status(f"loading {model}"):
        return load(model)


def cache_adapter(model: str, adapter: str | None) -> Any:
    """The `KVAdapter` that a command names, or the one that the package has for the model."""
    from nestling.kv.adapter import KVAdapter
    from nestling.kv.adapter_files import built_in

    if adapter is None and model not in built_in():
        raise AdapterError(
            f"{model}: the package has no adapter for it, but for {', '.join(built_in())}; make one by "
            f"nestling kv fit {model} --out adapter, and name it"
        )
    return KVAdapter.from_pretrained(model if adapter is None else adapter)


def loaded_encoder(model: str, sizes: str | None, adapter: str | None) -> Any:
    """The `ElasticEncoder` that a command's arguments name."""
    from nestling.embed import ElasticEncoder

    chosen = None if adapter == "none" else adapter
    return loading(lambda name: ElasticEncoder.from_pretrained(name, sizes, adapter=chosen), model)


def show(rows: list[dict], title: str) -> None:
    """Print rows as a table; the model is in its title."""
    from nestling.report.tables import table

    console.print(table([{k: v for k, v in r.items() if k != "model"} for r in rows], title=title))


def check_outputs(*files: Path | None, folder: Path | None = None, new: bool = False) -> None:
    """Look at the places of results before the work: what cannot be written is said now.

    Args:
        files: results, pages and figures; those of an earlier run may be there and are replaced, other files are not.
        folder: of the result; its own folder has to be there.
        new: whether it must not be there itself.

    Raises:
        FileError: one cannot be written, does not have a folder, is a user's file, or two are the same.
    """
    from nestling.files.writing import check_folder, check_result

    if folder is not None:
        if not folder.resolve().parent.is_dir():
            raise MissingFolderError(f"the folder of {folder} does not exist: make it first")
        if new and folder.exists():
            raise FileError(f"{folder} exists: choose another folder, or remove it")
        check_folder(folder)
    for path in files:
        check_result(path)
    places = [path.resolve() for path in (*files, folder) if path is not None and not path.is_char_device()]
    if double := [path for path in places if places.count(path) > 1]:
        raise FileError(f"{double[0].name} is named twice: choose another name for one of them")


def check_checkpoints(out: Path, resume: bool) -> None:
    """Look at the place of a training's checkpoints, beside that of its result, before anything is loaded."""
    from nestling.jobs.checkpoints import check_place

    check_place(out.with_name(f"{out.name}-checkpoints"), resume)


def write_results(path: Path | None, rows: list[dict], seconds: float | None = None) -> None:
    """Write the rows of ``--json``, if it was asked for, and say where."""
    if path is not None:
        from nestling.report.results import run_meta, write_json

        write_json(path, rows, run_meta(seconds))
        console.print(f"Results: {path}")


def write_curve(model: str, info: Any, json: Path | None, html: Path | None, what: str) -> None:
    """The curve of an encoder's training, as JSON and as a page, where they are wanted."""
    write_results(json, [{"model": model, **point} for point in info["curve"]], info["seconds"])
    if html is not None:
        from nestling.embed.report import write_training

        write_training(html, info, title=f"{model}: {what}")
        console.print(f"Report: {html}")
