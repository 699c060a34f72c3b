"""The texts that the packaged MiniLM is distilled on: a line each, from the folder of data sets.

    python benchmarks/elastic_data.py --data FOLDER --out texts.txt

Sentences of the sets that are measured on are dropped by the training itself (``--exclude``).
"""

import random
from collections.abc import Iterator
from pathlib import Path

import typer

from nestling.data.rows import open_rows

WORDS = range(3, 121)  # of a text
LONGEST = 600  # characters; passages are cut there
CAPTIONS = 2  # of a picture


def texts(data: Path) -> list[str]:
    """Distinct texts in random order: queries, passages, sentences of NLI, captions, questions and glosses."""
    found = {" ".join(text[:LONGEST].split()) for text in _all(data)}
    kept = sorted(text for text in found if len(text.split()) in WORDS)
    return random.Random(0).sample(kept, len(kept))


def _all(data: Path) -> Iterator[str]:
    for name, columns in (
        ("pairs/query_passage_train", ("query", "passage")),
        ("nli/nli_train", ("premise", "hypothesis")),
        ("pairs/quora_dev", ("text1", "text2")),
        ("pairs/wordnet_glosses", ("definition",)),
    ):
        for _, row in open_rows(str(data / f"{name}.jsonl.gz")).rows:
            yield from (row[column] for column in columns)
    for _, row in open_rows(str(data / "pairs/caption_groups.jsonl.gz")).rows:
        yield from row["texts"][:CAPTIONS]


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    out: Path = typer.Option(..., help="The file of texts, .txt."),
):
    found = texts(data)
    out.write_text("\n".join(found) + "\n", "utf-8")
    print(f"{len(found):,} texts")


if __name__ == "__main__":
    typer.run(main)
