"""Data sets of `datasets` by name: of the hub, or in a folder."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestling.data.jsonl import short
from nestling.data.memory import label_names
from nestling.data.told import logger
from nestling.errors import DataError
from nestling.files.models import check_no_pipes
from nestling.files.reading import reason

SPLIT = re.compile(r"(train|validation|valid|val|dev|test|eval)([^a-z].*)?", re.IGNORECASE)
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


def open_set(name: str, files: tuple[str, ...]) -> tuple[Iterator[tuple[str, Any]], dict[str, list[str]]]:
    """Rows of ``NAME[:CONFIG[:SPLIT]]``, beside where they are, streamed; and the names of integer labels by column.

    Args:
        files: endings of files, for the message that there is neither a file nor a data set of that name.
    """
    if not importlib.util.find_spec("datasets"):
        raise DataError(
            f"{name}: no such file ({', '.join(files)}); to read it as a data set: pip install 'nestling[data]'"
        )
    if os.path.isdir(name):
        check_no_pipes(Path(name), DataError)
    path, config, split = (name, "", "") if os.path.isdir(name) else (name.split(":") + ["", ""])[:3]
    try:
        rows = _loaded(path, config, split or "train")
    except DataError:
        raise
    except Exception as error:  # the library and its file readers raise all kinds
        raise DataError(
            f"{name}: neither a file ({', '.join(files)}) nor a data set that can be opened, "
            f"NAME[:CONFIG[:SPLIT]] [{reason(error)}]"
        ) from error
    return _numbered(name, rows), label_names(rows)


def chosen(names: list[str]) -> list[str]:
    """Which of several data sets are read: of the splits of one set ``train`` alone, of other sets all.

    Raises:
        DataError: they are splits, and none is called ``train``.
    """
    if len(names) == 1 or not any(SPLIT.fullmatch(name) for name in names):
        return names
    if "train" not in names:
        raise DataError(f"there are the splits {', '.join(names)}, and no train: say which is meant, data['...']")
    others = ", ".join(name for name in names if name != "train")
    logger.warning("of the splits of a data set train is read, not %s: give data['...'] for another", others)
    return ["train"]


def _loaded(path: str, config: str, split: str) -> Any:
    import datasets

    if not any(os.path.isfile(os.path.join(path, mark)) for mark in SAVED):
        return datasets.load_dataset(path, config or None, split=split, streaming=True)
    found = datasets.load_from_disk(path)
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(found)}: give {path}::SPLIT")
    return found[split]


def _numbered(name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise TypeError(f"expected a row of columns, got {short(row)}")
            yield f"{name}, row {number}", dict(row)
    except Exception as error:
        raise DataError(f"{name}: reading stopped after row {number} [{reason(error)}]") from error
