"""Principal components of taps against numpy's, and what they do to vectors that are cut."""

import numpy as np
import pytest
import torch
from sentence_transformers.base.modules import Dense

from nestling.embed.rotation import Rotation, rotations
from nestling.embed.taps import taps
from nestling.ladder import LadderError

from .families import HIDDEN, some_texts

TEXTS = some_texts(90)


def embedded(model, depth: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([taps(model, model.preprocess([text]), [depth])[depth] for text in TEXTS])


@pytest.mark.parametrize("centred", [False, True])
def test_the_components_are_those_of_numpy(centred, encoder):
    model = encoder("modernbert")
    found = rotations(model, iter(TEXTS), [4, 2], kind="centred" if centred else "pca", batch_size=7)
    assert list(found) == [2, 4]
    for depth, rotation in found.items():
        vectors = embedded(model, depth).double()
        moved = (vectors - vectors.mean(0) * centred).numpy()
        _, singular, right = np.linalg.svd(moved, full_matrices=False)
        agreement = np.abs((right * rotation.encode.double().numpy().T).sum(1))  # up to sign, where values differ
        apart = singular[:-1] / singular[1:] > 1.05
        assert (agreement[:-1][apart][:5] > 0.999).all()
        with torch.no_grad():
            coordinates = rotation(vectors.float())
        energy = coordinates.double().square().sum(0)
        np.testing.assert_allclose(energy.sqrt().numpy()[:8], singular[:8], rtol=1e-3)
        torch.testing.assert_close(rotation.encode.mT @ rotation.encode, torch.eye(HIDDEN), rtol=0, atol=1e-5)


def test_no_cut_keeps_more_than_components(encoder):
    """Similarities of cut vectors are nearer to the whole ones than with the first coordinates as they come."""
    model = encoder("bert")
    rotation = rotations(model, TEXTS, [4], kind="pca")[4]
    vectors = embedded(model, 4)
    whole = vectors @ vectors.mT
    for dims in (2, 4, 8, 16):
        errors = [(cut[:, :dims] @ cut[:, :dims].mT - whole).norm() for cut in (rotation(vectors), vectors)]
        assert errors[0] < 0.7 * errors[1]
    torch.testing.assert_close(rotation(vectors) @ rotation(vectors).mT, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_a_rotation_is_a_dense(centred, encoder):
    """What an export folds into its linear map: weight and bias give the same first coordinates."""
    model = encoder("bert")
    rotation = rotations(model, TEXTS, [2], kind="centred" if centred else "pca")[2]
    features = model.preprocess(TEXTS[:5])
    with torch.no_grad():
        plain = taps(model, features, [2, 4])
        turned = taps(model, features, [2, 4], {2: rotation})
    weight, bias = rotation.weight(8), rotation.bias(8)
    assert (bias is not None) == centred
    options = dict(activation_function=None, bias=centred, init_weight=weight, init_bias=bias)
    dense = Dense(HIDDEN, 8, **options)
    served = dense({"sentence_embedding": plain[2]})["sentence_embedding"]
    torch.testing.assert_close(turned[2][:, :8], served, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[4], plain[4], rtol=0, atol=0)


def test_the_model_is_left_as_it_was(encoder):
    """Dropout is off while components are taken, and on again after."""
    model = encoder("bert").train()
    found = rotations(model, TEXTS, [4])[4]
    assert model.training
    torch.testing.assert_close(found.encode.abs(), rotations(model.eval(), TEXTS, [4])[4].encode.abs())


def test_bad_input(encoder):
    model = encoder("bert")
    with pytest.raises(ValueError, match="expected texts to take rotations from, got none"):
        rotations(model, [], [4])
    with pytest.raises(LadderError, match="expected some of 1 to 4"):
        rotations(model, TEXTS, [5])
    for encode, mean in ((torch.eye(3, 4), None), (torch.ones(4), None), (torch.eye(4), torch.ones(3))):
        with pytest.raises(ValueError, match=r"expected encode \[H, H\] and mean \[H\]"):
            Rotation(encode, mean)
    same = rotations(model, ["w9"] * 3, [4])[4]  # one direction only: still a basis
    torch.testing.assert_close(same.encode.mT @ same.encode, torch.eye(HIDDEN), rtol=0, atol=1e-5)
