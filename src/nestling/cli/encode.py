"""The command ``nestling embed encode``."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.data import TextSource, show_what_is_told
from nestling.cli.options import takes
from nestling.cli.terminal import (
    Adapter,
    Encoder,
    Json,
    Sizes,
    check_outputs,
    console,
    errors_as_messages,
    write_results,
)
from nestling.embed.corpus.config import EncodeConfig
from nestling.errors import OptionError

COLUMNS, ENGINES = ("text", "id"), ("local", "processes", "ray")


@errors_as_messages
@takes(source=TextSource, config=EncodeConfig)
def encode(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the vectors; that of a run that was stopped goes on.")],
    source: TextSource,
    config: EncodeConfig,
    sizes: Sizes = None,
    adapter: Adapter = "auto",
    engine: Annotated[
        str, typer.Option(help="local, processes, or ray (Ray Data, on one machine or many).")
    ] = "local",
    json: Json = None,
) -> None:
    """Write the vectors of a corpus at several sizes of MODEL from one pass, with ids; a killed run goes on."""
    from nestling.embed.corpus.encode import encode_corpus

    check_outputs(json, folder=out)
    show_what_is_told()
    start = time.perf_counter()
    found = encode_corpus(
        model, source.text, out, replace(config, engine=_engine(engine)), sizes=sizes,
        adapter=None if adapter == "none" else adapter, columns=source.named(COLUMNS) or None, layout=source.layout,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    console.print(
        f"{found.rows:,} texts at {', '.join(found.sizes)} in {found.shards:,} shards, {nbytes / 1e6:,.1f} MB, "
        f"{seconds:,.1f} s. Saved to {out}"
    )
    row = {"model": model, "sizes": ",".join(found.sizes), "rows": found.rows, "bytes": nbytes, "engine": engine,
           "backend": config.backend}  # fmt: skip
    write_results(json, [row], seconds)


def _engine(name: str) -> Any:
    if name not in ENGINES:
        raise OptionError(f"--engine {name} is unknown: expected one of {', '.join(ENGINES)}")
    if name != "ray":
        return name
    from nestling.integrations.ray import ray_engine

    return ray_engine
