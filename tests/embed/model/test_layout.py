"""Folders as they are found: old releases, subfolders, parts, adapters, half precision; and what has no layers."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, StaticEmbedding
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from nestling.embed.export.export import export
from nestling.embed.model.encode import encode
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.taps import taps
from nestling.errors import LoadError, UnsupportedEncoderError

from ..families import FAMILIES, WORDS, save_backbone, sentence_model, some_texts, tokenizer
from ..ways import train

TEXTS = some_texts(9, seed=1)
LORA = dict(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["query", "value"])


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No hub, and no models of this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "models"))


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def rewritten(path: Path, change) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def into_subfolder(folder: Path) -> None:
    sub = folder / "0_Transformer"
    sub.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, sub / path.name)
    rewritten(folder / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))


def as_of_old(folder: Path) -> None:
    """As sentence-transformers 1 and 2 wrote it."""
    (folder / "config_sentence_transformers.json").unlink()
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')

    def old_names(modules):
        for module in modules:
            module["type"] = "sentence_transformers.models." + module["type"].rsplit(".", 1)[-1]

    rewritten(folder / "modules.json", old_names)


def in_parts(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")[0].model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def with_dots(folder: Path) -> None:
    def change(modules):
        modules[0]["path"] = "."
        modules[1]["path"] = "./1_Pooling/"

    rewritten(folder / "modules.json", change)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


@pytest.mark.parametrize(
    "change",
    [into_subfolder, as_of_old, in_parts, with_dots, both(in_parts, into_subfolder), both(as_of_old, into_subfolder)],
)
@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_valid_layouts(encoder, tmp_path, change, family):
    """Stock code reads them, and so do we; cups of them are those of the model."""
    model = encoder(family)
    model.save_pretrained(str(tmp_path / "model"))
    change(tmp_path / "model")
    stock = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    loaded = load_encoder(tmp_path / "model").cpu()
    close(loaded.encode(TEXTS), stock)
    close(loaded.encode(TEXTS), model.encode(TEXTS))
    cup = SentenceTransformer(str(export(loaded, "2x8", tmp_path / "cup").folder), device="cpu")
    unit = torch.nn.functional.normalize(encode(model, TEXTS, {2: 8})[2], dim=-1)
    close(cup.encode(TEXTS), unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda folder: None, into_subfolder])
def test_half_precision_in_any_place(encoder, tmp_path, dtype, change):
    model = encoder("modernbert").to(dtype)
    model.save_pretrained(str(tmp_path / "model"))
    change(tmp_path / "model")
    loaded = load_encoder(tmp_path / "model").cpu()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    stock = SentenceTransformer(str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": torch.float32})
    close(loaded.encode(TEXTS), stock.encode(TEXTS))


def test_tails(encoder, tmp_path):
    model = encoder()
    for module in (Dense(32, 24), LayerNorm(24), Normalize(), Dense(24, 16, activation_function=None)):
        model.append(module)
    model.save_pretrained(str(tmp_path / "model"))
    into_subfolder(tmp_path / "model")
    close(load_encoder(tmp_path / "model").cpu().encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_folders_with_a_pooling(backbones, family):
    loaded = load_encoder(backbones(family), pooling="mean").cpu()
    close(loaded.encode(TEXTS), sentence_model(backbones(family)).encode(TEXTS))
    with pytest.raises(LoadError, match="no modules.json.*pooling"):
        load_encoder(backbones(family))


# Adapters


def adapted(model, wrapped: bool):
    """A model with a random LoRA, put in by transformers or by PEFT's wrapper."""
    torch.manual_seed(3)
    if wrapped:
        model[0].model = get_peft_model(model[0].model, LoraConfig(**LORA))
    else:
        model.add_adapter(LoraConfig(**LORA))
    return model.eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_saved_adapter_is_loaded_and_merged(encoder, tmp_path, wrapped):
    base, model = encoder(), adapted(encoder(), wrapped)
    model.save_pretrained(str(tmp_path / "lora"))
    assert (tmp_path / "lora" / "adapter_config.json").is_file() and not (tmp_path / "lora" / "config.json").exists()
    loaded = load_encoder(tmp_path / "lora").cpu()
    close(loaded.encode(TEXTS), model.encode(TEXTS))
    assert np.abs(loaded.encode(TEXTS) - base.encode(TEXTS)).max() > 0.01
    assert not any("lora" in name for name, _ in loaded.named_parameters())


def test_an_adapter_of_an_alias(encoder, tmp_path):
    """The name that `load_encoder` gives a model is what PEFT writes down."""
    encoder().save_pretrained(str(tmp_path / "models" / "minilm"))
    model = adapted(load_encoder("minilm").cpu(), False)
    model.save_pretrained(str(tmp_path / "lora"))
    stated = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert stated == "minilm"
    close(load_encoder(tmp_path / "lora").cpu().encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("off", [False, True])
def test_an_adapter_is_exported_merged(encoder, tmp_path, wrapped, off):
    model = adapted(encoder(), wrapped)
    if off and not wrapped:
        model.disable_adapters()
    wanted = torch.nn.functional.normalize(encode(model, TEXTS, {2: 8})[2], dim=-1)
    names = [name for name, _ in model.named_parameters()]
    cup = SentenceTransformer(str(export(model, "2x8", tmp_path / "cup").folder), device="cpu")
    close(cup.encode(TEXTS), wanted)
    assert [name for name, _ in model.named_parameters()] == names  # the model keeps its adapter


def test_training_an_adapter_gives_a_folder_that_loads(encoder, tmp_path):
    model = adapted(encoder(), False)
    options = dict(steps=1, learning_rate=0.1, progress=False, save_strategy="no", projection="none")
    train(model, TEXTS, "1x8,4x32", folder=tmp_path / "out", **options)
    wanted = model.eval().encode(TEXTS)
    close(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS), wanted)
    close(load_encoder(tmp_path / "out").cpu().encode(TEXTS), wanted)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json does not say what it adapts"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "adapter_config.json does not say what it adapts"),
        (
            lambda f: rewritten(f / "adapter_config.json", lambda c: c.update(base_model_name_or_path="no/where")),
            "no/where",
        ),
    ],
)
def test_damaged_adapters(encoder, tmp_path, damage, expected):
    adapted(encoder(), False).save_pretrained(str(tmp_path / "lora"))
    damage(tmp_path / "lora")
    with pytest.raises(LoadError, match=expected):
        load_encoder(tmp_path / "lora")


# What has no layers to cut, or cannot be read


def clip(folder: Path) -> None:
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=100, **small).to_dict(),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **small).to_dict(),
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"}])
    )


def router(folder: Path) -> None:
    routes = {
        kind: list(sentence_model(save_backbone("bert", folder.with_name(f"bert-{kind}"))))
        for kind in ("query", "document")
    }
    SentenceTransformer(modules=[Router(routes, default_route="query")], device="cpu").save_pretrained(str(folder))


def static(folder: Path) -> None:
    words = StaticEmbedding(tokenizer()._tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words], device="cpu").save_pretrained(str(folder))


@pytest.mark.parametrize("make", [router, static, clip])
def test_models_without_layers(tmp_path, make):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(LoadError, match="it has no layers to cut") as error:
        load_encoder(folder)
    assert str(folder) in str(error.value)


def test_pickled_weights_of_any_module_are_refused(encoder, tmp_path):
    model = encoder()
    model.append(LayerNorm(32))
    model.save_pretrained(str(tmp_path / "model"))
    weights = model[2].state_dict()
    (tmp_path / "model" / "2_LayerNorm" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "2_LayerNorm" / "pytorch_model.bin")
    with pytest.raises(LoadError, match="2_LayerNorm has no model.safetensors, and other weights are not read"):
        load_encoder(tmp_path / "model")


def test_a_subfolder_that_lacks_weights(encoder, tmp_path):
    """The tensors that are counted are those of the subfolder."""
    encoder().save_pretrained(str(tmp_path / "model"))
    into_subfolder(tmp_path / "model")
    rewritten(tmp_path / "model" / "0_Transformer" / "config.json", lambda c: c.update(num_hidden_layers=5))
    with pytest.raises(LoadError, match="the weights lack 16 tensors"):
        load_encoder(tmp_path / "model")
    (tmp_path / "model" / "0_Transformer" / "config.json").unlink()
    with pytest.raises(LoadError, match="its folder 0_Transformer has no config.json"):
        load_encoder(tmp_path / "model")


def test_code_of_a_plain_folder_is_neither_run_nor_asked_about(backbones, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(backbones("bert"), tmp_path / "model"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    rewritten(folder / "config.json", lambda c: c.update(model_type="evil", auto_map=names))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    with pytest.raises(LoadError):
        load_encoder(folder, pooling="mean")


# Lengths


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert"])
def test_texts_are_cut_to_the_positions_there_are(encoder, tmp_path, family):
    """Saved with more, as RoBERTas are by themselves: their positions start behind the padding token's number."""
    model = encoder(family)
    model.max_seq_length = 1000
    model.save_pretrained(str(tmp_path / "model"))
    rewritten(tmp_path / "model" / "sentence_bert_config.json", lambda c: c.update(max_seq_length=1000))
    loaded = load_encoder(tmp_path / "model").cpu()
    first = 2 if family == "mpnet" else 1 if "roberta" in family else 0
    assert loaded.max_seq_length == 64 - first
    long = " ".join(WORDS[:80])
    assert np.isfinite(loaded.encode([long])).all()
    assert loaded.preprocess([long])["input_ids"].shape[1] == loaded.max_seq_length
    loaded.max_seq_length += 1
    if family != "mpnet":  # it takes this tokenizer's first token for padding, and so has room for another
        with pytest.raises((IndexError, RuntimeError)):
            loaded.encode([long])


def test_lengths_that_fit_are_kept(encoder, tmp_path):
    for family, length in (("bert", 16), ("modernbert", 1000)):
        model = encoder(family)
        model.max_seq_length = length
        model.save_pretrained(str(tmp_path / family))
        path = tmp_path / family / "sentence_bert_config.json"
        rewritten(path, lambda config, length=length: config.update(max_seq_length=length))
        assert load_encoder(tmp_path / family).max_seq_length == length


def test_unrelated_weights_are_not_taken_for_an_encoder(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="neither modules.json nor config.json"):
        load_encoder(tmp_path)


def test_types():
    with pytest.raises(UnsupportedEncoderError, match="starts with a StaticEmbedding: it has no layers to cut"):
        taps(SentenceTransformer(modules=[StaticEmbedding(tokenizer()._tokenizer, embedding_dim=8)]), {}, [1])
    assert issubclass(LoadError, ValueError) and Transformer is not Pooling
