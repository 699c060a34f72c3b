"""The command line: ``nestling kv ...``, ``nestling embed ...`` and ``nestling demo``.

The commands of a wing are in a file of their own.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.embed import embed_app
from nestling.cli.examples import add_examples
from nestling.cli.kv import kv_app
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

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="One model, every size.")


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


@demo_app.command("kv")
@errors_as_messages
def demo_kv(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or alias.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="The report to write.")] = Path("report.html"),
    context: Annotated[int, typer.Option(help="Tokens of the text that is read."), positive] = 1700,
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
    steps: Annotated[int, typer.Option(help="Steps of training."), positive] = 60,
    cup: Annotated[str | None, typer.Option(help="Cup to export and use; default: the second of the ladder.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the trained model and the cup in this folder.")] = None,
    json: Json = None,
) -> None:
    """Make an encoder elastic by following itself, compare cups before and after, export one and search with it."""
    from nestling.embed.demo import run

    check_outputs(out, json, folder=keep)
    start = time.perf_counter()
    rows = run(model, out, steps, cup, keep, console)
    write_results(json, rows, time.perf_counter() - start)


add_examples({"kv": kv_app, "embed": embed_app, "demo": demo_app})
