"""What lies beside a stock model: ladder and rotations; written whole or not at all."""

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from nestling.embed.ladder import Ladder
from nestling.embed.model import hub
from nestling.embed.model.folder import load_ladder, load_rotations, write_rotations
from nestling.embed.model.projection import Rotation
from nestling.errors import LadderError, LoadError


def test_folders_without_a_ladder(tmp_path):
    assert load_ladder(tmp_path) is None and load_rotations(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"cups": 3}', '{"cups": [{"layers": 0, "dims": 2}]}', '{"format": 9}'])
def test_damaged_ladders_are_named(tmp_path, text):
    (tmp_path / "nestling.json").write_text(text)
    with pytest.raises(LadderError, match=r"nestling.json is damaged"):
        load_ladder(tmp_path)


def test_an_export_is_its_own_cup(tmp_path):
    value = str(Ladder.parse("1x8,4x32").to_json() | {"cup": "1x8"}).replace("'", '"')
    (tmp_path / "nestling.json").write_text(value)
    assert str(load_ladder(tmp_path)) == "1x8"


def test_rotations_round_trip(tmp_path):
    turns = {1: Rotation(torch.eye(4).flip(0)), 3: Rotation(torch.eye(4), torch.arange(4.0))}
    (tmp_path / "nestling.json").write_text(
        '{"cups": [{"layers": 3, "dims": 4}], "rotations": "rotations.safetensors"}'
    )
    with pytest.raises(LadderError, match="rotations.safetensors is missing"):
        load_rotations(tmp_path)
    write_rotations(tmp_path / "rotations.safetensors", turns)
    found = load_rotations(tmp_path)
    assert list(found) == [1, 3] and found[1].mean is None
    torch.testing.assert_close(found[3].mean, turns[3].mean)
    torch.testing.assert_close(found[1].encode, turns[1].encode)
    (tmp_path / "rotations.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LadderError, match="rotations.safetensors is damaged"):
        load_rotations(tmp_path)


def test_what_a_model_on_the_hub_has_is_fetched(tmp_path, monkeypatch):
    files = {"nestling.json": '{"cups": [{"layers": 3, "dims": 4}], "rotations": "rotations.safetensors"}'}
    (tmp_path / "nestling.json").write_text(files["nestling.json"])
    write_rotations(tmp_path / "rotations.safetensors", {3: Rotation(torch.eye(4).flip(0))})
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if repository == "user/gone":
            raise ConnectionError("401 Client Error")
        if repository == "user/offline":
            raise LocalEntryNotFoundError("no network")
        if repository == "user/plain" or not (tmp_path / name).is_file():
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert str(load_ladder("user/elastic")) == "3x4"
    torch.testing.assert_close(load_rotations("user/elastic")[3].encode, torch.eye(4).flip(0))
    assert asked == [("user/elastic", name) for name in ("nestling.json", "nestling.json", "rotations.safetensors")]
    assert load_ladder("user/plain") is None and load_rotations("user/plain") == {}
    with pytest.warns(
        UserWarning, match="nestling.json cannot be loaded from the hub.*: taken for a model without cups"
    ):
        assert load_ladder("user/offline") is None
    with pytest.raises(
        LoadError, match="user/gone: no folder has that name, and nestling.json cannot be loaded from the hub"
    ):
        load_ladder("user/gone")
    (tmp_path / "rotations.safetensors").unlink()
    with pytest.raises(LadderError, match="user/elastic: rotations.safetensors is missing"):
        load_rotations("user/elastic")
