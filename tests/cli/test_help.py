"""``--help`` of every command: fits 80 columns with nothing cut, says what its words mean, and shows what works."""

import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from nestling.cli import app
from nestling.cli.examples import EXAMPLES, NOTES
from nestling.cli.words import EMBED_TERMS, KV_TERMS, defined

ROOT = get_command(app)
WINGS = {name: command for name, command in ROOT.commands.items() if hasattr(command, "commands")}
ALONE = [name for name in ROOT.commands if name not in WINGS]
COMMANDS = [f"{wing} {name}" for wing, group in WINGS.items() for name in group.commands] + ALONE


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("words", ["", *WINGS, *COMMANDS])
def test_help_fits_and_cuts_nothing(words):
    text = shown(*words.split())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


@pytest.mark.parametrize("words", COMMANDS)
def test_help_defines_its_words_and_shows_examples_that_are_read(words):
    text = " ".join(shown(*words.split()).split())
    *wing, name = words.split()
    group = WINGS[wing[0]] if wing else ROOT
    assert words in EXAMPLES, f"nestling.cli.examples has no example of nestling {words}"
    assert NOTES.get("".join(wing), "") in text
    used = [word for word in ("budget", "adapter", "rank", "passkey") if f"--{word}" in text and wing == ["kv"]]
    assert all(defined(word, KV_TERMS).removeprefix("Words: ") in text for word in used)
    assert wing != ["embed"] or EMBED_TERMS["sizes?"] in text
    for example in EXAMPLES[words]:
        assert example in text
        program, *arguments = shlex.split(example)
        assert program == "nestling" and arguments[: len(wing) + 1] == [*wing, name]
        group.commands[name].make_context(name, arguments[len(wing) + 1 :])  # unknown and missing options are refused


@pytest.mark.parametrize("words", ["", *WINGS, *COMMANDS])
def test_help_says_what_options_take_in_words(words):
    """Neither types of Python nor those of click, and nothing for what takes nothing."""
    text = shown(*words.split())
    assert not re.search(r"<\w+(\[\w+\])?>|\b(INTEGER|FLOAT|BOOLEAN)\b|\[\[|NoneType", text)
    assert re.search(r"--help\s+Show this", text)


def test_terms_that_a_help_uses_are_said():
    terms = {"ranks?": "A RANK is one.", "KL": "KL is another."}
    assert defined("Search the ranks", terms) == "Words: A RANK is one."
    assert defined("the KL of --rank", terms) == "Words: A RANK is one. KL is another."
    assert defined("franks and KLs", terms) == ""


def test_there_are_no_examples_of_commands_that_went():
    assert set(EXAMPLES) == set(COMMANDS)


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "nestling", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == CliRunner().invoke(app, ["--version"]).stdout


def test_help_and_version_do_not_wait_for_torch():
    code = (
        "import sys; from nestling.cli import app; app({!r}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    for arguments in (["--version"], ["kv", "eval", "--help"], ["embed", "train", "--help"]):
        result = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert re.search("nestling", result.stdout)
