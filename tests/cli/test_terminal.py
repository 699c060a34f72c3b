"""What reaches the terminal: names as they are, mistakes as one line, our own errors with their traceback."""

import io
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from nestling.cli import app
from nestling.cli.terminal import errors_as_messages, natural, not_negative, positive
from nestling.errors import DataError, FileError, OptionError, TrainingError
from nestling.report.page import Section, write_html
from nestling.report.tables import markdown_table, table
from nestling.visible import visible, visible_lines

NAMES = {
    "closing tag": "runs[/old]",
    "colour": "run[red]",
    "link": "a[link=file:///etc/passwd]b[/link]",
    "emoji": "a:smile:b",
    "title": "a\x1b]0;pwned\x07b",
    "clear": "a\x1b[2J\x1b[1;1Hb",
    "eight bits": "a\x9b31mb",
    "line": "a\nerror: b",
    "return": "a\rb",
    "bidi": "a\u202egnp.b",
    "isolate": "a\u2066b",
    "separator": "a\u2028b",
    "surrogate": "a\udce9b",
}
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def command(body) -> typer.Typer:
    one = typer.Typer()
    one.command()(errors_as_messages(body))
    return one


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_is_one_line_without_controls(name):
    shown = visible(name)
    assert not RAW.search(shown) and "\n" not in shown
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_text_that_can_be_read_stays_as_it_is():
    for text in ("Grüße, 日本語", "می\u200cخواهم", "👩\u200d💻", "a\\b [x]"):
        assert visible(text) == text
    assert visible_lines("one\n\ttwo \u200fשלום") == "one\n\ttwo \u200fשלום"
    assert visible_lines("a\x1b[2Jb\rc") == r"a\x1b[2Jb\rc"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", [FileError, OSError, DataError])
def test_an_error_is_one_line_whatever_it_names(name, kind):
    def fail():
        raise kind(f"{name} cannot be read")

    result = CliRunner().invoke(command(fail), [])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines == [f"error: {visible(name)} cannot be read"] and not RAW.search(lines[0])


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_tables_titles_and_pages_show_names_as_text(name, tmp_path):
    rows = [{name: "column", "cell": name}]
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=True).print(table(rows, title=name))
    assert out.getvalue().count(visible(name)) == 3
    assert not RAW.search(COLOURS.sub("", out.getvalue()))
    write_html(tmp_path / "r.html", name, name, [Section(name, rows=rows, pre=name)], {name: name})
    page = (tmp_path / "r.html").read_text("utf-8")
    assert not RAW.search(page)
    assert not RAW.search(markdown_table(rows))


def test_markdown_cells_are_no_markup():
    rows = [{"m": "[x](http://y) `z` *b* <img src=q> a\\|b &lt;"}]
    cell = markdown_table(rows).splitlines()[2]
    assert cell == r"| \[x\](http://y) \`z\` \*b\* &lt;img src=q> a\\\|b &amp;lt; |"


def in_a_terminal(code: str) -> str:
    """What a process writes to a terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []
    while part := _read(ours):
        parts.append(part)
    os.close(ours)
    shown = b"".join(parts).decode("utf-8", "replace")
    assert process.wait(timeout=60) == 0, shown
    return shown


def _read(file: int) -> bytes:
    try:
        return os.read(file, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def test_lines_status_rules_and_bars_in_a_real_terminal():
    code = f"""
import time
from nestling.cli.terminal import console, loading, show
from nestling.jobs.progress import progress_bar
for name in {list(NAMES.values())!r}:
    loading(lambda model: time.sleep(.2), name)
    console.print(f"Saved to {{name}}")
    console.rule(name)
    show([{{name: name}}], name)
    with progress_bar() as bar:
        bar.add_task(name, total=2)
"""
    shown = in_a_terminal(code)
    for name in NAMES.values():
        assert f"Saved to {visible(name)}" in COLOURS.sub("", shown).replace("\r\n", "\n")
    assert "]0;pwned\x07" not in shown and "\x1b[2J" not in shown and "\x9b" not in shown
    assert not re.search("[\u202e\u2066\u2028]", shown)
    assert "\x1b]8;" not in shown  # no link was made


def test_mistakes_of_ours_show_their_traceback():
    for error in (ValueError("raw"), RuntimeError("raw"), KeyError("raw"), AssertionError("raw"), TypeError("raw")):
        result = CliRunner().invoke(command(_raising(error)), [])
        assert result.exit_code == 1
        assert "Traceback" in result.stderr and "test_terminal.py" in result.stderr and "report it" in result.stderr
        assert f"error: {type(error).__name__}: " in result.stderr


def _raise(error: BaseException):
    raise error


def _raising(error: BaseException):
    return lambda: _raise(error)


def test_verbose_shows_the_traceback_of_a_users_mistake(tmp_path):
    arguments = ["kv", "inspect", str(tmp_path / "nowhere")]
    quiet = CliRunner().invoke(app, arguments)
    loud = CliRunner().invoke(app, ["-v", *arguments])
    again = CliRunner().invoke(app, arguments)
    assert "Traceback" not in quiet.stderr and "Traceback" in loud.stderr and again.stderr == quiet.stderr
    assert loud.stderr.splitlines()[-1] == quiet.stderr.splitlines()[-1]
    assert {result.exit_code for result in (quiet, loud, again)} == {1}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes."),
    ],
)
def test_a_lack_of_memory_is_said_without_a_traceback(error, wrapped):
    def fail():
        if not wrapped:
            raise error
        raise TrainingError("step 3 stopped; checkpoint-2 is kept in x") from error

    result = CliRunner().invoke(command(fail), [])
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert "memory" in result.stderr and len(result.stderr.splitlines()) == 1
    assert ("checkpoint-2" in result.stderr) == wrapped


def test_an_interrupt_says_how_to_go_on(tmp_path):
    def work(out: Annotated[Path, typer.Option()], resume: Annotated[bool, typer.Option()] = False):
        raise KeyboardInterrupt

    out = tmp_path / "new[/x]"
    before = CliRunner().invoke(command(work), ["--out", str(out)])
    assert before.exit_code == 130 and "--resume" not in before.stderr and len(before.stderr.splitlines()) == 1
    (tmp_path / "new[").mkdir()
    work_folder = out.with_name("x]-checkpoints")
    work_folder.mkdir()
    (work_folder / "training.json").write_text("{}")
    after = CliRunner().invoke(command(work), ["--out", str(out)])
    assert after.exit_code == 130 and "--resume" in after.stderr and str(work_folder) in after.stderr


def test_warnings_are_lines_too():
    def warned():
        warnings.warn("a[/b]\x1b[2J of its own", stacklevel=2)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = CliRunner().invoke(command(warned), [])
    assert result.exit_code == 0 and result.stderr == "warning: a[/b]\\x1b[2J of its own\n"


@pytest.mark.parametrize("value", ["-3", "0", "1.5", "nan"])
def test_options_are_checked_by_their_annotations(value):
    ran = []

    def work(
        batch_size: Annotated[float, typer.Option(), positive] = 8,
        lines: Annotated[list[float] | None, typer.Option(), positive] = None,
    ):
        ran.append(1)

    for option in ("--batch-size", "--lines"):
        result = CliRunner().invoke(command(work), [f"{option}={value}"])
        assert result.exit_code == 1 and option in result.stderr and not ran
    assert CliRunner().invoke(command(work), ["--batch-size=3", "--lines=4"]).exit_code == 0 and ran


BAD_NUMBERS = [
    ("kv fit m --out new", ("--tokens", "--length"), ("-5", "0")),
    ("kv fit m --out new", ("--sinks", "--window"), ("-1",)),
    ("kv train m --out new", ("--tokens", "--length", "--batch-size"), ("-5", "0")),
    ("kv train m --out new", ("--learning-rate",), ("-1", "0", "nan", "inf")),
    ("kv search m a --out new", ("--windows", "--length"), ("-5", "0")),
    ("kv eval m a", ("--length", "--chunk", "--rows", "--passkey"), ("-5", "0")),
    ("kv eval m a", ("--windows",), ("-5",)),
    ("kv generate m a --prompt x", ("--max-new-tokens",), ("-5", "0")),
    ("kv generate m a --prompt x", ("--temperature",), ("-1", "nan", "inf")),
    ("embed train m --out new", ("--steps", "--batch-size", "--mini-batch-size"), ("-5", "0")),
    ("embed train m --out new", ("--learning-rate", "--epochs"), ("-1", "0", "nan", "inf")),
    ("embed train m --out new", ("--warmup", "--projection-rate"), ("-1", "nan", "inf")),
    ("embed train m --out new", ("--seed",), ("-1",)),
    ("embed pretrain m --out new --steps 3", ("--batch-size", "--length", "--save-steps"), ("-5", "0")),
    ("embed pretrain m --out new --steps 3", ("--sizes-per-step",), ("-5",)),
    ("embed pretrain m --out new --steps 3", ("--encoder-ratio", "--decoder-ratio"), ("-1", "0", "2", "nan")),
    ("embed eval m", ("--batch-size",), ("-3", "0")),
    ("demo kv", ("--tokens", "--context"), ("-3",)),
]  # fmt: skip


@pytest.mark.parametrize(("words", "options", "values"), BAD_NUMBERS, ids=[words for words, _, _ in BAD_NUMBERS])
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(words, options, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in options:
        for value in values:
            result = CliRunner().invoke(app, [*words.split(), f"{option}={value}"])
            assert result.exit_code == 1, (option, value, result.output)
            assert option in result.stderr and "Traceback" not in result.stderr
            assert re.search(rf"{re.escape(option)}={re.escape(value)}(\.0)?\b", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_checks_are_those_of_the_library():
    for check, bad in ((positive, 0), (natural, -1), (not_negative, float("nan"))):
        with pytest.raises(OptionError):
            check("--x", bad)


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "-v"], ["-v", "--version"]])
def test_the_version(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout.startswith("nestling ")
    words = [line.partition(":")[0] for line in result.stdout.splitlines()[1:]]
    expected = {"python", "torch", "transformers", "sentence-transformers", "devices", "threads", "kernels"}
    assert expected <= set(words) if len(arguments) == 2 else not words


def test_the_version_without_extras_or_a_working_torch(monkeypatch):
    from nestling.cli import version

    monkeypatch.setattr(version, "version_of", lambda package: None)
    monkeypatch.setattr(version, "_devices", lambda: _raise(RuntimeError("driver")))
    monkeypatch.setattr(version, "_kernels", lambda: _raise(ImportError("transformers")))
    result = CliRunner().invoke(app, ["--version", "-v"])
    assert result.exit_code == 0
    assert "sentence-transformers: not installed" in result.stdout and "devices: unknown" in result.stdout
