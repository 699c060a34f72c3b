"""Files of an encoder, in a folder or on the hub: what stock code does not fetch, or fetches in another format."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from nestling.errors import LoadError, UnreachableError
from nestling.files.reading import check_regular, reason
from nestling.models import ALIASES

_ADVICE = (
    "no folder has that name, and {} cannot be loaded from the hub; check the spelling, the network, HF_HUB_OFFLINE, "
    "and that you may access it"
)


def find_file(source: str | os.PathLike[str], name: str) -> Path | None:
    """The file of that name; None if the source does not have it.

    Args:
        source: a folder, a hub id, from which it is downloaded, or an alias, which is of a stock model and has none.
        name: of the file within it, such as ``"2_Dense/model.safetensors"``.

    Raises:
        UnreachableError, LoadError: whether there is such a file cannot be known; there is no such source; something
            that is no file has its name.
    """
    source = os.fspath(source)
    if source in ALIASES:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / name
        if not os.path.lexists(path):
            return None
        check_regular(path, LoadError)
        return path
    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:  # the hub was not asked: it may have the file
        raise UnreachableError(f"{source}: {_ADVICE.format(name)} [{reason(error)}]") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # no such id, no access, no network
        raise LoadError(f"{source}: {_ADVICE.format(name)} [{reason(error)}]") from error
