"""No dropout in modules and in attention, of every family, and all of it back afterwards."""

import pytest
import torch

from nestling.embed.model.dropout import without_dropout

from ..families import FAMILIES, some_texts


@pytest.mark.parametrize("family", FAMILIES)
def test_train_mode_gives_the_vectors_of_eval_mode(encoder, family):
    model = encoder(family)
    for module in model.modules():  # some families have none by default
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        for name, value in vars(module).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.3)
    features = model.preprocess(some_texts(3))
    with torch.no_grad():
        expected = model(dict(features))["sentence_embedding"]
        model.train()
        with without_dropout(model):
            found = model(dict(features))["sentence_embedding"]
        noisy = model(dict(features))["sentence_embedding"]
        with without_dropout(model, off=False):
            unchanged = model(dict(features))["sentence_embedding"]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(noisy, expected) and not torch.allclose(unchanged, expected)
    assert model.training
