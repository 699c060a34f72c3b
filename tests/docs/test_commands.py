"""Every command in the README and in docs has the options that the command line has."""

import re
import shlex

import click
import pytest
import typer

from nestling.cli import app
from tests.docs.pages import ROOT, blocks, pages

SHELL = ("sh", "console")


def commands() -> list:
    found = []
    for page in pages():
        for block in blocks(page):
            if block.language in SHELL:
                text = re.sub(r"\\\n\s*", " ", block.text)
                for line in text.splitlines():
                    words = shlex.split(line.removeprefix("$ "), comments=True)
                    if "nestling" in words:
                        name = f"{page.relative_to(ROOT)}:{block.line} {' '.join(words)}"
                        found.append(pytest.param(words[words.index("nestling") + 1 :], id=name))
    return found


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_docs_is_one(words):
    command: click.Command = typer.main.get_command(app)
    context = command.make_context("nestling", list(words), resilient_parsing=False)
    while isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not isinstance(command, click.Group) or words[0].startswith("--")
