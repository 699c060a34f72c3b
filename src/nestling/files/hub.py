"""Uploading a folder to the hub."""

from collections.abc import Callable
from pathlib import Path

from nestling.errors import NestlingError
from nestling.files.temporary import private_temporary_folder


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
