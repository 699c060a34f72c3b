"""Options of commands that come from configs."""

from dataclasses import dataclass
from functools import partial

import pytest
import typer
from typer.testing import CliRunner

from nestling.cli.options import takes
from nestling.cli.terminal import errors_as_messages
from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.options import choice, flag, whole


@dataclass(frozen=True, kw_only=True)
class Sizes(Config):
    """Options of a test."""

    tokens: int = option(64, "Tokens in all.", whole)
    steps: int | None = option(None, "Steps; default: by the tokens.", whole)
    basis: str = option("auto", "Which basis.", partial(choice, known=("auto", "pca")))
    quantise: bool = option(True, "Whether codes are stored.", flag)
    secret: int = option(3, "Not on the command line.", whole, cli=False)


app = typer.Typer()


@app.command()
@errors_as_messages
@takes(config=Sizes)
def show(name: str, config: Sizes, times: int = 1) -> None:
    """Show what was given."""
    typer.echo(f"{name} {times} {config}")


def run(*words: str):
    return CliRunner().invoke(app, [*words])


def test_a_command_is_given_the_config_of_its_options():
    result = run("a", "--tokens", "5", "--basis", "pca", "--no-quantise", "--times", "2")
    assert result.stdout == f"a 2 {Sizes(tokens=5, basis='pca', quantise=False)}\n"
    assert run("a").stdout == f"a 1 {Sizes()}\n"


def test_help_has_the_help_of_the_fields():
    text = run("--help").stdout
    assert "Tokens in all." in text and "secret" not in text and "--no-quantise" in text


@pytest.mark.parametrize(("words", "named"), [(("--tokens", "0"), "--tokens=0"), (("--basis", "x"), "--basis='x'")])
def test_values_out_of_range_are_named_as_they_were_given(words, named):
    result = run("a", *words)
    assert result.exit_code == 1 and named in result.stderr


def test_a_config_checks_its_values():
    assert Sizes(tokens=7.0).tokens == 7 and isinstance(Sizes(tokens=7.0).tokens, int)
    with pytest.raises(OptionError, match="tokens=0"):
        Sizes(tokens=0)
    with pytest.raises(OptionError, match="expected a Sizes"):
        Sizes.of({"tokens": 3})
    assert Sizes.of(None) == Sizes() and Sizes.of(Sizes(tokens=3)).tokens == 3
    assert Sizes().to_dict()["steps"] is None
