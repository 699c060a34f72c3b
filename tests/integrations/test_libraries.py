"""Libraries of integrations: what is said where one is not installed."""

import sys

import pytest

from nestling.errors import MissingExtraError
from nestling.integrations.libraries import library


def test_a_library_is_imported():
    assert library("json.decoder", "faiss").__name__ == "json.decoder"


def test_a_missing_library_names_itself_and_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nowhere_to_be_had", None)
    with pytest.raises(MissingExtraError, match=r"no-where is not installed.*pip install 'nestling\[faiss\]'"):
        library("nowhere_to_be_had", "faiss", "no-where")


def test_what_a_library_itself_lacks_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_library.py").write_text("import something_else_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else") as caught:
        library("half_a_library", "faiss")
    assert not isinstance(caught.value, MissingExtraError)
