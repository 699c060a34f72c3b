"""Which labelled pairs mean the same: labels by name, integers whose meaning is known, or what the user says.

Data sets of entailment have 0 = entailment, 1 = neutral, 2 = contradiction, or, with two labels, either order. So
integers are read where a third label or their names tell the order, and are asked about otherwise.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from nestling.data.jsonl import short
from nestling.data.told import logger
from nestling.errors import DataError, OptionError

Label = str | int
# Everything else that has a name is another meaning: neutral, contradiction, not_entailment, not_duplicate, ...
NAMES = {"entailment", "entails", "entailed", "duplicate", "equivalent", "paraphrase", "same", "similar", "positive",
         "true", "yes"}  # fmt: skip
UNLABELLED = (-1, "-", "")  # pairs that nobody agreed on, in SNLI


def positive_labels(positive: Any, names: list[str] | None) -> set[Label] | None:
    """What the user says, as labels are compared: one label or several, integers or names."""
    if positive is None:
        return None
    several = positive if isinstance(positive, list | tuple | set | frozenset) else [positive]
    found = {label for item in several if (label := plain_label(item, names)) is not None}
    if not several or len(found) < len(several):
        raise OptionError(f"positive={short(positive)}: expected a label, such as 'entailment' or 0, or several")
    return found


def plain_label(value: Any, names: list[str] | None = None) -> Label | None:
    """A label as it is compared: an integer, or a name in small letters; None for what is no label."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # of numpy
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as a column of pandas with gaps has it
    if isinstance(value, str):
        value = re.sub(r"[\s-]+", "_", value.strip().lower()) if value.strip() != "-" else "-"
        if not re.fullmatch(r"[_-]?[0-9]{1,9}", value):
            return value
        value = int(value.replace("_", "-"))
    if not isinstance(value, int):
        return None
    return plain_label(names[value]) if names and 0 <= value < len(names) else value


def positive_pairs(
    rows: Iterable[tuple[str, dict[str, str], Any]],
    entailment: bool,
    names: list[str] | None,
    positive: Any,
    left_out: Counter[str],
) -> Iterator[dict[str, str]]:
    """The pairs whose label says that they mean the same, in order.

    Args:
        rows: where each pair is, the pair, and its label.
        entailment: whether the columns are those of entailment; else integers are 1 for the same meaning, or 0.
        names: of integer labels, if they are known.
        positive: the label or labels of pairs that mean the same, if the user says so.
        left_out: counts the others, by label.

    Raises:
        OptionError: ``positive`` is no label.
        DataError: a label is none, it is not known what the integers mean, or no pair is positive.
    """
    wanted = positive_labels(positive, names)
    held: list[dict[str, str]] | None = [] if entailment else None  # labelled 0, until a 2 shows what that means
    unknown, found, where = "", 0, ""
    others: Counter[Label] = Counter()
    for where, pair, value in rows:
        label = plain_label(value, names)
        if label is None:
            raise DataError(f"{where}: 'label' must be an integer or a text, got {short(value)}")
        if label in UNLABELLED and (wanted is None or label not in wanted):
            left_out["pairs without a label"] += 1
            continue
        if wanted is not None or isinstance(label, str):
            good = label in (NAMES if wanted is None else wanted)
        elif label not in ((0, 1, 2) if entailment else (0, 1)):
            raise DataError(f"{where}: it is not known what the label {label} means: {_ask(label)}")
        elif held is None:
            good = label == (0 if entailment else 1)
            if not entailment and not unknown:
                unknown = where
                logger.warning("%s: the label 1 is taken for the same meaning; if it is not, say positive=...", where)
        else:
            unknown = unknown or where
            if label == 2:
                logger.warning("%s: integer labels are read as 0 entailment, 1 neutral, 2 contradiction", where)
                yield from held
                found, held = found + len(held), None
            elif label == 0:
                held.append(pair)
                continue
            good = False
        if good:
            found += 1
            yield pair
        else:
            others[label] += 1
    left_out.update({f"pairs labelled {label}": count for label, count in others.items()})
    if held is not None and unknown:
        raise DataError(f"{unknown}: it is not known whether 0 or 1 means entailment: {_ask(0)}")
    if not found and where and not others:
        raise DataError(f"{where}: no pair up to here has a label")
    if not found and others:
        some = ", ".join(map(repr, list(others)[:10]))
        raise DataError(f"{where}: no pair up to here is positive, labels are {some}: {_ask(next(iter(others)))}")


def _ask(label: Any) -> str:
    return f"say which label means the same, such as positive={label!r} (on the command line --positive-label {label})"


def check_positive(positive: Any, labelled: bool) -> None:
    """Refuse to be told about labels where there are none."""
    if positive is not None and not labelled:
        raise OptionError(f"positive={short(positive)}: these rows have no labels, leave it out")


Positive = Label | Collection[Label]
