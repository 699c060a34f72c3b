"""The command ``nestling play``."""

from typing import Annotated

import typer

from nestling.cli.options import takes
from nestling.cli.terminal import cache_adapter, console, errors_as_messages, loaded_encoder, loading
from nestling.integrations.play.config import PlayConfig


@errors_as_messages
@takes(config=PlayConfig)
def play(
    config: PlayConfig,
    model: Annotated[str, typer.Option(help="Language model: hub id, folder, .gguf file, or alias.")] = "smollm2",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter of its cache: folder or hub id; default: that of the package.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Text encoder: hub id, folder, or alias.")] = "minilm",
) -> None:
    """Try a small cache and a small encoder beside the full ones, on a page in the browser."""
    from nestling.integrations.play.server import Player

    player = Player(config)
    from nestling.integrations.play.finder import Finder
    from nestling.integrations.play.page import Page
    from nestling.integrations.play.reader import Reader
    from nestling.models import load_model

    nested = cache_adapter(model, adapter)
    language_model, tokenizer = loading(load_model, model)
    reader = Reader(model, language_model, tokenizer, nested)
    finder = Finder(encoder, loaded_encoder(encoder, None, "auto"))
    server = player.server(Page(reader, finder))
    console.print(f"{model} and {encoder} at {player.url}")
    server.run(sockets=[player.socket])
