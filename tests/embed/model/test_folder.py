"""What lies beside a stock model: ladder and projections; written whole or not at all."""

import json

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from nestling.embed.ladder import Ladder
from nestling.embed.model import hub
from nestling.embed.model.folder import load_ladder, load_projections, write_projections
from nestling.embed.model.projection import Projection
from nestling.errors import LadderError, LoadError


def test_folders_without_a_ladder(tmp_path):
    assert load_ladder(tmp_path) is None and load_projections(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"cups": 3}', '{"cups": [{"layers": 0, "dims": 2}]}', '{"format": 9}'])
def test_damaged_ladders_are_named(tmp_path, text):
    (tmp_path / "nestling.json").write_text(text)
    with pytest.raises(LadderError, match=r"nestling.json is damaged"):
        load_ladder(tmp_path)


def test_an_export_is_its_own_cup(tmp_path):
    value = str(Ladder.parse("1x8,4x32").to_json() | {"cup": "1x8"}).replace("'", '"')
    (tmp_path / "nestling.json").write_text(value)
    assert str(load_ladder(tmp_path)) == "1x8"


@pytest.mark.parametrize("name", ["projections", "rotations"])  # the latter in folders of earlier releases
def test_projections_round_trip(tmp_path, name):
    turns = {1: Projection(torch.eye(4).flip(0)), 3: Projection(torch.eye(4), torch.arange(4.0))}
    said = {"cups": [{"layers": 3, "dims": 4}], name: f"{name}.safetensors"}
    (tmp_path / "nestling.json").write_text(json.dumps(said))
    with pytest.raises(LadderError, match=f"{name}.safetensors is missing"):
        load_projections(tmp_path)
    write_projections(tmp_path / f"{name}.safetensors", turns)
    found = load_projections(tmp_path)
    assert list(found) == [1, 3] and found[1].mean is None
    torch.testing.assert_close(found[3].mean, turns[3].mean)
    torch.testing.assert_close(found[1].encode, turns[1].encode)
    (tmp_path / f"{name}.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LadderError, match=f"{name}.safetensors is damaged"):
        load_projections(tmp_path)
    (tmp_path / "nestling.json").write_text(json.dumps({**said, name: "other.safetensors"}))
    with pytest.raises(LadderError, match="must be one of"):
        load_projections(tmp_path)


def test_what_a_model_on_the_hub_has_is_fetched(tmp_path, monkeypatch):
    files = {"nestling.json": '{"cups": [{"layers": 3, "dims": 4}], "projections": "projections.safetensors"}'}
    (tmp_path / "nestling.json").write_text(files["nestling.json"])
    write_projections(tmp_path / "projections.safetensors", {3: Projection(torch.eye(4).flip(0))})
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
    torch.testing.assert_close(load_projections("user/elastic")[3].encode, torch.eye(4).flip(0))
    assert asked == [("user/elastic", name) for name in ("nestling.json", "nestling.json", "projections.safetensors")]
    assert load_ladder("user/plain") is None and load_projections("user/plain") == {}
    with pytest.warns(
        UserWarning, match="nestling.json cannot be loaded from the hub.*: taken for a model without sizes"
    ):
        assert load_ladder("user/offline") is None
    with pytest.raises(
        LoadError, match="user/gone: no folder has that name, and nestling.json cannot be loaded from the hub"
    ):
        load_ladder("user/gone")
    (tmp_path / "projections.safetensors").unlink()
    with pytest.raises(LadderError, match="user/elastic: projections.safetensors is missing"):
        load_projections("user/elastic")
