"""Where a model comes from, as far as the card beside it says so: its base, its licence, its languages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache
from sentence_transformers import SentenceTransformer

from nestling.errors import LoadError
from nestling.models import ALIASES, locate

BASES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # what aliases are on the hub
KEPT = ("license", "license_name", "license_link", "language")  # of the base's card
LARGEST = 1 << 20  # bytes of a card
NAME = r"\w[\w.-]*"


@dataclass(frozen=True)
class Origin:
    """What a card may say of a model's origin; nothing of it is made up.

    Attributes:
        name: the alias or hub id that it was loaded as, else its base's, else its folder's own; "" if none is known.
        base: the hub id of what it was made from, or "".
        facts: entries of the base's card: its licence and its languages.
    """

    name: str
    base: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As a heading has it."""
        return self.name or "encoder"

    @property
    def noun(self) -> str:
        """As a sentence has it."""
        return f"`{self.name}`" if self.name else "an encoder"


def origin_of(model: SentenceTransformer) -> Origin:
    """From the name that a model carries, and the card of the folder, alias or cached hub model of that name."""
    name = str(getattr(model[0].model, "name_or_path", "") or "")
    known, found = loaded_as(name), _metadata(name)
    facts = {key: found[key] for key in KEPT if _is_plain(found.get(key))}
    stated = found.get("base_model")
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    base = BASES.get(known, known if "/" in known else "")
    if not known and isinstance(stated, str) and re.fullmatch(f"{NAME}/{NAME}", stated, re.ASCII):
        base = stated
    folder = Path(name).name
    own = folder if name and re.fullmatch(NAME, folder, re.ASCII) else ""
    return Origin(known or base or own, base, facts)


def loaded_as(name: str) -> str:
    """The name itself if it is an alias or a hub id; "" for a folder, which means nothing elsewhere."""
    return name if re.fullmatch(f"{NAME}(/{NAME})?", name, re.ASCII) and not Path(name).exists() else ""


def _metadata(name: str) -> dict[str, Any]:
    """The front matter of the card of a model; empty where there is none, or none that can be read."""
    try:
        path = _card(name)
        if path is None or not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        return metadata_load(path) or {}
    except Exception:  # cards are prose: one that is no YAML says nothing
        return {}


def _card(name: str) -> Path | None:
    if not name:
        return None
    if name not in ALIASES and Path(name).expanduser().is_dir():
        return Path(name).expanduser() / "README.md"
    try:
        source = locate(name)
    except LoadError:
        return None
    if isinstance(source, Path):
        return source / "README.md"
    cached = try_to_load_from_cache(source, "README.md")
    return Path(cached) if isinstance(cached, str) else None


def _is_plain(value: Any) -> bool:
    """A text, or texts in a list."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, str) and item for item in values)
