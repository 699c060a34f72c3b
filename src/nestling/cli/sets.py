"""The data of encoders: what is trained on, and what is measured on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.cli.data import (
    AS,
    COLUMNS,
    KINDS,
    LANGUAGE,
    TEXT,
    columns_of,
    layout_of,
    sentences_from,
    show_what_is_told,
    those,
)
from nestling.config import Config, option
from nestling.data.told import Rows
from nestling.errors import DataError, OptionError

STS = ("sentence1", "sentence2", "score", "subset")


@dataclass(frozen=True, kw_only=True)
class TrainingData(Config):
    """What `nestling embed train` trains on, and measures on: built-in text, and some of it, if nothing is named."""

    pairs: list[str] | None = option(None, f"Pairs or triplets to train on: {KINDS}; may be repeated.")
    positive_label: str | None = option(
        None, "Label of pairs that mean the same, where that cannot be known, such as 0."
    )
    scored: str | None = option(None, f"Scored pairs to train on: {KINDS}.")
    text: str | None = option(None, f"Texts to follow the model itself on: .txt (or .gz), {KINDS}; default: built-in.")
    columns: str | None = option(None, COLUMNS)
    lines: bool | None = option(None, AS, flags=("--lines/--documents",))
    language: str = option("en", LANGUAGE)
    sts: list[str] | None = option(None, f"Scored pairs to measure on: {KINDS}; may be repeated.")
    retrieval: list[str] | None = option(
        None, "Folder in BEIR's layout to measure on, FOLDER:dev for another split; may be repeated."
    )

    def rows(self) -> Rows:
        """What is trained on.

        Raises:
            OptionError: more than one kind is named, or an option of a kind that is not.
            DataError: the data cannot be read.
        """
        named = [f"--{name}" for name in ("pairs", "scored", "text") if getattr(self, name)]
        if len(named) > 1:
            raise OptionError(
                f"{' and '.join(named)}: only one kind of data can be trained on at a time, leave one out"
            )
        if self.positive_label is not None and not self.pairs:
            raise OptionError(f"--positive-label {self.positive_label}: that is of --pairs, leave it out")
        if self.lines is not None and (self.pairs or self.scored):
            raise OptionError(f"--{layout_of(self.lines)}: that is of --text, leave it out")
        if self.pairs:
            return pairs_from(self.pairs, self._columns(), self.positive_label)
        if self.scored:
            return scored_from(self.scored, self._columns())
        return sentences_from(self.text, self.lines, self._columns(), self.language)

    def evaluator(self) -> Any:
        """A `GridEvaluator` of the sets that are named; None if there are none."""
        return evaluator_of(self.sts, self.retrieval, self._columns())

    def _columns(self) -> dict[str, str]:
        from nestling.data.pairs import KNOWN

        return columns_of(self.columns, KNOWN if self.pairs else STS if self.scored else TEXT, STS if self.sts else ())


@dataclass(frozen=True, kw_only=True)
class EncoderSets(Config):
    """What `nestling embed eval` measures on: labelled sets, or else the agreement on texts without labels."""

    sts: list[str] | None = option(None, f"Scored pairs to measure on: {KINDS}; may be repeated.")
    retrieval: list[str] | None = option(
        None, "Folder in BEIR's layout to measure on, FOLDER:dev for another split; may be repeated."
    )
    text: str | None = option(None, f".txt (or .gz), {KINDS}; default: built-in English pages.")
    columns: str | None = option(None, COLUMNS)
    lines: bool | None = option(None, AS, flags=("--lines/--documents",))
    language: str = option("en", LANGUAGE)
    prompt: list[str] | None = option(
        None, "By use, such as query='query: '; uses: sts, query, passage; default: the model's own."
    )

    def evaluator(self, **options: Any) -> Any:
        """A `GridEvaluator` of the sets that are named; None if there are none.

        Raises:
            OptionError: there are texts beside them.
        """
        if self.text is not None and (self.sts or self.retrieval):
            raise OptionError("--text is what is measured on where there is no --sts and no --retrieval: leave it out")
        return evaluator_of(self.sts, self.retrieval, self._columns(), prompts=self.prompts(), **options)

    def prompts(self) -> dict[str, str]:
        """Prompts by use.

        Raises:
            OptionError: one is not written so, or nothing that is measured has that use.
        """
        found = {}
        for item in self.prompt or ():
            use, equals, prompt = item.partition("=")
            if not equals:
                raise OptionError(f"--prompt {item!r}: expected a name and a text, such as query='query: '")
            found[use.strip()] = prompt
        uses = (["query", "passage"] if self.retrieval else []) + (["sts"] if self.sts or not self.retrieval else [])
        if unused := [use for use in found if use not in uses]:
            raise OptionError(
                f"--prompt {unused[0]}: nothing that is measured has that use, expected {', '.join(uses)}"
            )
        return found

    def sentences(self) -> Rows:
        """The sentences of the texts."""
        return sentences_from(self.text, self.lines, self._columns(), self.language)

    def _columns(self) -> dict[str, str]:
        return columns_of(self.columns, STS if self.sts else (), () if self.sts or self.retrieval else TEXT)


def pairs_from(pairs: list[str], columns: dict[str, str], positive: str | None) -> Rows:
    """Rows of all files and data sets that ``--pairs`` names.

    Raises:
        DataError: they have different columns.
    """
    from nestling.data.pairs import KNOWN, read_pairs

    show_what_is_told()
    rows = Rows([])
    for name in pairs:
        found = read_pairs(name, columns=those(columns, KNOWN) or None, positive=positive)
        if rows and list(found[0]) != list(rows[0]):
            raise DataError(
                f"{name}: columns {', '.join(found[0])}, expected {', '.join(rows[0])} as in {pairs[0]}: train on one "
                "kind at a time"
            )
        rows += found
        rows.left_out += found.left_out
    return rows


def scored_from(scored: str, columns: dict[str, str]) -> Rows:
    """Rows of what ``--scored`` or ``--sts`` names."""
    from nestling.data.pairs import read_sts

    show_what_is_told()
    return read_sts(scored, columns=those(columns, STS) or None)


def evaluator_of(sts: list[str] | None, retrieval: list[str] | None, columns: dict[str, str], **options: Any) -> Any:
    """An evaluator of the sets that are named, None if there are none."""
    from nestling.embed import GridEvaluator

    if not sts and not retrieval:
        return None
    scored = {name: scored_from(source, columns) for name, source in _named(sts or []).items()}
    return GridEvaluator(sts=scored, retrieval=_named(retrieval or []), **options)


def _named(sources: list[str]) -> dict[str, str]:
    """Sets by the name of their file, folder or data set, with its split if one is named."""
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        name = path.resolve().name if path.exists() else source.rstrip("/").rsplit("/", 1)[-1].replace(":", "_")
        for ending in (".gz", ".jsonl", ".csv", ".tsv", ".parquet"):
            name = name.removesuffix(ending)
        if name in found:
            raise OptionError(f"{source}: there is another set called {name}, {found[name]}: rename one")
        found[name] = source
    return found
