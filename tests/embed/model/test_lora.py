"""Models with adapters, trained: their best checkpoint is read back, and a training goes on, by their own weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from nestling import embed
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.lora import TRAINED_FILE, load_trained, save_trained
from nestling.errors import TrainingError

from ..families import some_texts
from ..sets import scored
from ..ways import train
from .test_layout import adapted

TEXTS = some_texts(40, seed=1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_best_checkpoint_of_an_alias_with_an_adapter(encoder, tmp_path, monkeypatch, wrapped):
    """PEFT writes down the alias, which stock code cannot load: the checkpoint is read by what was trained."""
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "models"))
    encoder().save_pretrained(str(tmp_path / "models" / "minilm"))
    model = adapted(load_encoder("minilm").cpu(), wrapped)
    before = model.encode(TEXTS)
    dev = embed.GridEvaluator(sts={"dev": scored()})
    options = dict(steps=4, learning_rate=1e-2, evaluator=dev, progress=False, eval_on_start=False)
    train(model, TEXTS, "2x8,4x32", folder=tmp_path / "out", **options)
    wanted = model.eval().encode(TEXTS)
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)  # stock, without PEFT's files
    assert np.abs(found - wanted).max() < 1e-5 and not (tmp_path / "out" / "adapter_config.json").exists()
    assert np.abs(before - wanted).max() > 1e-4


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_trained_is_put_back(encoder, tmp_path, wrapped):
    """Nothing else is written, so that a checkpoint of a LoRA stays small."""
    model, path = adapted(encoder(), wrapped), tmp_path / TRAINED_FILE
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    wanted = model.encode(TEXTS)
    save_trained(model, path)
    assert path.stat().st_size < 0.5 * sum(4 * p.numel() for p in model.parameters())
    other = adapted(encoder(), wrapped)
    assert np.abs(other.encode(TEXTS) - wanted).max() > 0.01
    load_trained(other, path)
    np.testing.assert_allclose(other.encode(TEXTS), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_checkpoints_name_the_file(encoder, tmp_path, damage):
    model, path = adapted(encoder(), False), tmp_path / TRAINED_FILE
    save_trained(model, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "gone":
        path.unlink()
    else:
        save_file({f"x.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(TrainingError, match=TRAINED_FILE):
        load_trained(model, path)
