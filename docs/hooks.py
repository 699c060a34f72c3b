"""What mkdocs adds to the pages: every command's ``--help`` in cli.md, so that it is never out of date."""

import typer.cli
from typer.main import get_command

from nestling.cli import app


def on_page_markdown(markdown: str, page, **options) -> str:
    """Put the commands in the place of their mark."""
    if page.file.src_uri != "cli.md":
        return markdown
    command = get_command(app)
    shown = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="nestling")
    return markdown.replace("<!-- commands -->", shown.partition("\n")[2])
