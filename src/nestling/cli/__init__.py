"""The command line: ``nestling kv ...``, ``nestling embed ...``, ``nestling demo`` and ``nestling play``.

The commands of a wing are in a file of their own.
"""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.embed import embed_app
from nestling.cli.examples import add_examples
from nestling.cli.kv import kv_app
from nestling.cli.play import play
from nestling.cli.terminal import (
    Json,
    check_outputs,
    console,
    errors_as_messages,
    natural,
    positive,
    tracebacks,
    write_results,
)
from nestling.cli.version import show_version

BEGIN = "Where to begin: nestling demo kv, nestling demo embed, or, with the extra play installed, nestling play."
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="One model, every size.", epilog=BEGIN)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version; with -v, all that matters.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where errors come from.")] = False,
) -> None:
    """One model, every size."""
    tracebacks.on = verbose
    if version:
        show_version(verbose)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


demo_app = typer.Typer(no_args_is_help=True, help="End to end on a small real model, without the hub.")
app.add_typer(kv_app, name="kv")
app.add_typer(embed_app, name="embed")
app.add_typer(demo_app, name="demo")
app.command("play")(play)


@demo_app.command("kv")
@errors_as_messages
def demo_kv(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or alias.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="The report to write.")] = Path("report.html"),
    context: Annotated[int, typer.Option(help="Tokens of the text that is read."), positive] = 4096,
    tokens: Annotated[
        int, typer.Option(help="Calibrate on this many, even if the package has an adapter."), natural
    ] = 0,
    json: Json = None,
) -> None:
    """Read a long text into caches of three sizes, ask about it, measure what each costs; a page shows it all."""
    from nestling.kv.demo import run

    check_outputs(out, json)
    start = time.perf_counter()
    rows = run(model, out, context, tokens, console)
    write_results(json, rows, time.perf_counter() - start)


@demo_app.command("embed")
@errors_as_messages
def demo_embed(
    model: Annotated[str, typer.Option(help="Hub id, folder, or alias.")] = "minilm",
    out: Annotated[Path, typer.Option(help="The report to write.")] = Path("report-embed.html"),
    size: Annotated[str | None, typer.Option(help="Size to search with; default: the second smallest.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="New folder for the encoder; default: elastic, or elastic-2 and so on.")
    ] = None,
    json: Json = None,
) -> None:
    """Give an encoder several sizes without training it, compare them, search with one; a page shows it all."""
    from nestling.embed.demo import run

    folder = next(path for path in _folders("elastic") if not path.exists()) if keep is None else keep
    check_outputs(out, json, folder=folder, new=True)
    start = time.perf_counter()
    rows = run(model, out, size, folder, console)
    write_results(json, rows, time.perf_counter() - start)


def _folders(name: str) -> Iterator[Path]:
    return (Path(name if number == 1 else f"{name}-{number}") for number in count(1))


add_examples({"kv": kv_app, "embed": embed_app, "demo": demo_app, "": app})
