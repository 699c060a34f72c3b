"""Taps against models that are really shallower: configs cut by hand, the same weights, loaded by stock code."""

import shutil

import pytest
import torch

from nestling.embed.taps import taps

from .families import FAMILIES, LAYERS, cut_folder, sentence_model, some_texts

TOLERANCE = dict(rtol=0, atol=1e-5)


def truncated(folder, tmp_path, depth, pooling, **options):
    """The independent k-layer model."""
    cut = shutil.copytree(folder, tmp_path / f"cut-{depth}", dirs_exist_ok=True)
    cut_folder(cut, depth)
    return sentence_model(cut, pooling, **options)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_is_the_truncated_model(family, pooling, side, backbones, tmp_path):
    folder = backbones(family, side)
    model = sentence_model(folder, pooling)
    features = model.preprocess(some_texts(5))
    assert (features["attention_mask"][:, 0 if side == "left" else -1] == 0).any()  # there is padding on that side
    with torch.no_grad():
        tapped = taps(model, features, range(1, LAYERS + 1))
        assert list(tapped) == [1, 2, 3, 4]
        for depth, vectors in tapped.items():
            expected = truncated(folder, tmp_path, depth, pooling)(dict(features))["sentence_embedding"]
            torch.testing.assert_close(vectors, expected, **TOLERANCE)
