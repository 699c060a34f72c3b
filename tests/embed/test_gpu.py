"""On a GPU: encoding, fine-tuning and pre-training with the numbers of the CPU."""

import copy

import pytest
import torch

from nestling.embed.model.encode import encode
from nestling.embed.pretraining.pretrain import pretrain

from .families import FAMILIES
from .pretraining.test_autoencoder import KNOWN, autoencoder, batch, gradients
from .pretraining.test_pretrain import config as pretrain_config
from .pretraining.test_pretrain import texts
from .training.test_train import CUPS, pairs
from .ways import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_all_depths(encoder, family):
    model = encoder(family)
    depths, found = {1: 8, 2: 16, 4: 32}, []
    for device in ("cpu", "cuda"):
        found.append(encode(copy.deepcopy(model).to(device), texts(20), depths))
    for depth in depths:
        torch.testing.assert_close(found[1][depth].cpu(), found[0][depth].cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", KNOWN)
def test_losses_and_gradients_of_pre_training(encoder, family):
    smae, (given,) = autoencoder(encoder(family)), batch()
    expected = smae(given)
    slopes = gradients(smae, expected)
    there = copy.deepcopy(smae).cuda()
    found = there({key: value if key == "sizes" else value.cuda() for key, value in given.items()})
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-4, atol=1e-4)
    for name, slope in gradients(there, found).items():
        torch.testing.assert_close(slope.cpu(), slopes[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["pretrain", "train"])
def test_trainings_follow_the_cpu(encoder, tmp_path, kind):
    curves = []
    for device in ("cpu", "cuda"):
        # ModernBERT has no dropout, whose random numbers are others there
        model, folder, cpu = encoder("modernbert").to(device), tmp_path / f"{device}-{len(curves)}", device == "cpu"
        options = {"learning_rate": 1e-3, "batch_size": 8, "progress": False, "use_cpu": cpu, "logging_steps": 2}
        if kind == "pretrain":
            trained = pretrain(model, texts(), CUPS, pretrain_config(output_dir=folder, **options))
        else:
            trained = train(model, pairs(), CUPS, folder=folder, steps=12, **options)
        curves.append([point["loss"] for point in trained.info["curve"] if "loss" in point])
    assert len(curves[0]) > 3 and curves[1] == pytest.approx(curves[0], rel=0.02)
