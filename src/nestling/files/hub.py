"""Folders that go to the hub and come from there."""

from collections.abc import Callable, Sequence
from pathlib import Path

from nestling.errors import AdapterError, NestlingError
from nestling.files.temporary import private_temporary_folder


def download(repo_id: str, names: Sequence[str]) -> Path:
    """A folder with those files of an adapter that a repository has.

    Raises:
        AdapterError: there is no such repository, or no access to it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(names)))
    except Exception as error:  # no such id, no access, no network, in the classes of several libraries
        raise AdapterError(
            f"{repo_id} is neither an adapter folder nor a hub id that can be reached ({type(error).__name__})"
        ) from error


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool,
    token: str | None,
    message: str,
    failure: type[NestlingError],
) -> str:
    """Upload what ``save`` writes into a new folder; the address of the repository, which is made if it is not there.

    Raises:
        NestlingError: of the kind ``failure``, if the repository cannot be made or written to; what ``save`` raises.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with private_temporary_folder() as work:
            save(work / "saved")
            api.upload_folder(repo_id=repo_id, folder_path=work / "saved", commit_message=message)
    except NestlingError:
        raise
    except Exception as error:  # of the hub, of the network, of the access
        raise failure(
            f"{repo_id} cannot be written to ({type(error).__name__}: {error}): check the id, the network, and "
            "whether your token may write there"
        ) from error
    return str(address)
