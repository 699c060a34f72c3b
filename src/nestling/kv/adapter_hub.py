"""Uploading an adapter to the hub, beside whatever else its repository has."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from nestling.errors import AdapterError
from nestling.files.hub import upload
from nestling.kv.adapter_files import CARD_FILE, CONFIG_FILE


def push(save: Callable[[Path], None], repo_id: str, private: bool, token: str | None) -> str:
    """Upload what ``save`` writes into a folder; the address of the repository, which is made if it is not there.

    Raises:
        AdapterError: the repository cannot be made or written to.
    """

    def write(folder: Path) -> None:
        other = _has_other_card(repo_id, token)
        if other:
            folder.mkdir()
            (folder / CARD_FILE).touch()  # so that the adapter's card gets another name
        save(folder)
        if other:
            (folder / CARD_FILE).unlink()

    return upload(write, repo_id, private=private, token=token, message="nestling KV adapter", failure=AdapterError)


def _has_other_card(repo_id: str, token: str | None) -> bool:
    """Whether a repository has a ``README.md`` that is not an adapter's; no, where nobody can tell."""
    from huggingface_hub import file_exists

    with contextlib.suppress(Exception):  # no network, no access: uploading says so
        return {name for name in (CARD_FILE, CONFIG_FILE) if file_exists(repo_id, name, token=token)} == {CARD_FILE}
    return False
