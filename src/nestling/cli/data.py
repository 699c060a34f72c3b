"""Options that name data, and reading what they name: texts, pairs, and sets to measure on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nestling.cli.terminal import messages
from nestling.config import Config, option
from nestling.data.told import Rows, logger, tell_left_out
from nestling.errors import DataError, OptionError
from nestling.jobs.processes import rank

KINDS = ".jsonl, .csv, .tsv (or .gz), .parquet, or a data set by its name on the hub"
COLUMNS = "Names of columns there, such as text=body; commas between several."
AS = "Texts are one a line, or stand between blank lines; default: as they look."
LANGUAGE = "Language of documents, whose abbreviations end no sentence, such as de."
Language = Annotated[str, typer.Option(help=LANGUAGE)]
TEXT = ("text",)


@dataclass(frozen=True, kw_only=True)
class TextSource(Config):
    """Which texts a command reads, and how: what ``@takes(source=TextSource)`` puts in its place."""

    text: str | None = option(None, f".txt (or .gz), {KINDS}; default: built-in English pages.")
    columns: str | None = option(None, COLUMNS)
    lines: bool | None = option(None, AS, flags=("--lines/--documents",))

    def named(self, *known: Iterable[str]) -> dict[str, str]:
        """``--columns`` as a dictionary; see `columns_of`."""
        return columns_of(self.columns, *known)

    @property
    def layout(self) -> Any:
        """The layout that ``--lines`` or ``--documents`` asks for."""
        return layout_of(self.lines)

    def read(self) -> Any:
        """The texts, as `nestling.data.texts.read_texts` reads them.

        Raises:
            OptionError: ``--columns`` names other columns than that of the texts.
        """
        return texts_from(self.text, self.lines, self.named(TEXT))

    def sentences(self, language: str = "en") -> Rows:
        """The sentences of the texts; see `sentences_from`."""
        return sentences_from(self.text, self.lines, self.named(TEXT), language)


def columns_of(given: str | None, *known: Iterable[str]) -> dict[str, str]:
    """``"anchor=question,positive=answer"`` as a dictionary.

    Args:
        known: the columns of each reader at work; one of them must know each name.

    Raises:
        OptionError: it is not written so, or no reader knows a name.
    """
    found: dict[str, str] = {}
    for item in given.split(",") if given is not None else ():
        new, equals, old = (part.strip() for part in item.partition("="))
        if not (new and equals and old) or new in found:
            raise OptionError(f"--columns {given!r}: expected names by names, such as anchor=question,positive=answer")
        found[new] = old
        if not any(those(found, names).get(new) for names in known):
            expected = ", ".join(dict.fromkeys(name for names in known for name in names)) or "none"
            raise OptionError(f"--columns {given!r}: {new} is not read here; expected some of {expected}")
    return found


def those(columns: dict[str, str], known: Iterable[str]) -> dict[str, str]:
    """Those of the columns that a reader knows."""
    names = tuple(known)
    fits = {new: new in names or ("negative" in names and new.startswith("negative")) for new in columns}
    return {new: old for new, old in columns.items() if fits[new]}


def layout_of(lines: bool | None) -> Any:
    """The layout of texts that ``--lines`` or ``--documents`` asks for."""
    return "auto" if lines is None else "lines" if lines else "documents"


def texts_from(text: str | None, lines: bool | None = None, columns: dict[str, str] | None = None) -> Any:
    """The texts that ``--text`` names, as `read_texts` reads them."""
    from nestling.data.texts import read_texts

    show_what_is_told()
    return read_texts(text, columns=those(columns or {}, TEXT) or None, layout=layout_of(lines))


def sentences_from(
    text: str | None, lines: bool | None = None, columns: dict[str, str] | None = None, language: str = "en"
) -> Rows:
    """Sentences of what ``--text`` names; texts that stand by themselves are taken as they are."""
    from nestling.data.sentences import sentences
    from nestling.jobs.progress import progress_bar

    texts = texts_from(text, lines, columns)
    with progress_bar(rank() == 0) as bar:
        task = bar.add_task("splitting texts into sentences", total=None)
        texts.on_text = lambda: bar.advance(task)
        found = sentences(texts, language=language)
    tell_left_out(text or "the built-in pages", found.left_out)
    if not found:
        raise DataError(
            f"{text}: no sentences of four words and more were found, expected prose; if each text stands by itself, "
            "say --lines"
        )
    return found


class _OnConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages.print(record.getMessage(), style="dim", highlight=False)


def show_what_is_told() -> None:
    """Show what readers take for granted and leave out; under ``torchrun`` the first process speaks for all."""
    if not any(isinstance(handler, _OnConsole) for handler in logger.handlers):
        logger.addHandler(_OnConsole(logging.INFO if rank() == 0 else logging.CRITICAL))
        logger.setLevel(logging.INFO)
