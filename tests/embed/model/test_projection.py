"""Principal components and regressions of taps against numpy's, and what they do to vectors that are cut."""

import numpy as np
import pytest
import torch
from sentence_transformers.base.modules import Dense

from nestling.embed.model import projection as module
from nestling.embed.model.encode import encode
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.model.taps import taps
from nestling.errors import LadderError

from ..families import HIDDEN, some_texts

TEXTS = some_texts(90)


def embedded(model, depth: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([taps(model, model.preprocess([text]), [depth])[depth] for text in TEXTS])


@pytest.mark.parametrize("centred", [False, True])
def test_the_components_are_those_of_numpy(centred, encoder):
    model = encoder("modernbert")
    found = fit_projections(model, iter(TEXTS), [4, 2], kind="centred" if centred else "pca", batch_size=7)
    assert list(found) == [2, 4]
    for depth, projection in found.items():
        vectors = embedded(model, depth).double()
        moved = (vectors - vectors.mean(0) * centred).numpy()
        _, singular, right = np.linalg.svd(moved, full_matrices=False)
        agreement = np.abs((right * projection.encode.double().numpy().T).sum(1))  # up to sign, where values differ
        apart = singular[:-1] / singular[1:] > 1.05
        assert (agreement[:-1][apart][:5] > 0.999).all()
        with torch.no_grad():
            coordinates = projection(vectors.float())
        energy = coordinates.double().square().sum(0)
        np.testing.assert_allclose(energy.sqrt().numpy()[:8], singular[:8], rtol=1e-3)
        torch.testing.assert_close(projection.encode.mT @ projection.encode, torch.eye(HIDDEN), rtol=0, atol=1e-5)


def test_no_cut_keeps_more_than_components(encoder):
    """Similarities of cut vectors are nearer to the whole ones than with the first coordinates as they come."""
    model = encoder("bert")
    projection = fit_projections(model, TEXTS, [4], kind="pca")[4]
    vectors = embedded(model, 4)
    whole = vectors @ vectors.mT
    for dims in (2, 4, 8, 16):
        errors = [(cut[:, :dims] @ cut[:, :dims].mT - whole).norm() for cut in (projection(vectors), vectors)]
        assert errors[0] < 0.7 * errors[1]
    torch.testing.assert_close(projection(vectors) @ projection(vectors).mT, whole, rtol=1e-4, atol=1e-4)


def predicted(coordinates, target) -> float:
    """How much of the target's variance a linear map of coordinates tells."""
    inputs, wanted = (np.asarray(part, np.float64) for part in (coordinates, target))
    inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    fitted = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    return (fitted**2).sum() / (wanted**2).sum()


def best_of_rank(vectors, target, dims: int) -> float:
    """The most that any linear map to so many coordinates can tell: the first singular values of the regression."""
    inputs, wanted = (np.asarray(part, np.float64) for part in (vectors, target))
    inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    fitted = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    return (np.linalg.svd(fitted, compute_uv=False)[:dims] ** 2).sum() / (wanted**2).sum()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("flatten", [0.0, 0.5])
def test_aligned_prefixes_tell_most_of_the_full_model(family, flatten, encoder, monkeypatch):
    """Each prefix is the best that linear maps of its size can do, and better than as many principal components."""
    monkeypatch.setattr("nestling.embed.model.projection.RIDGE", 1e-6)
    monkeypatch.setattr("nestling.embed.model.projection.OWN", 1e-3)
    monkeypatch.setattr("nestling.embed.model.projection.FLATTEN", flatten)
    model = encoder(family)
    texts = list(dict.fromkeys(some_texts(400)))
    vectors = encode(model, texts, {2: HIDDEN, 4: HIDDEN})
    full = torch.nn.functional.normalize(vectors[4], dim=-1)
    turned = fit_projections(model, texts, [2])[2](vectors[2])
    components = fit_projections(model, texts, [2], kind="centred")[2](vectors[2])
    for dims in (1, 2, 4, 8, 16):
        told = predicted(turned[:, :dims], full)
        assert told == pytest.approx(best_of_rank(vectors[2], full, dims), rel=5e-3), dims
        assert told > predicted(components[:, :dims], full)


def test_aligned_similarities_are_nearer_to_the_full_models(encoder, monkeypatch):
    monkeypatch.setattr("nestling.embed.model.projection.FLATTEN", 0.0)
    model, texts = encoder("bert"), list(dict.fromkeys(some_texts(400)))
    vectors = encode(model, texts, {2: HIDDEN, 4: HIDDEN})
    new = slice(300, None)  # texts that it was not aligned on

    def cosines(rows):
        units = torch.nn.functional.normalize(rows[new], dim=-1)
        return units @ units.mT

    wanted, errors = cosines(vectors[4] - vectors[4].mean(0)), {}
    for kind in ("aligned", "centred"):
        turned = fit_projections(model, texts[:300], [2], kind=kind)[2](vectors[2])
        errors[kind] = (cosines(turned[:, :8]) - wanted).abs().mean()
    assert errors["aligned"] < 0.95 * errors["centred"], errors


@pytest.mark.parametrize("width", [8, 100])
def test_a_target_of_any_width(width, encoder):
    """What a narrow teacher cannot fill is filled by the vectors themselves; the full depth is aligned to none."""
    model, texts = encoder("bert"), list(dict.fromkeys(some_texts(200)))
    vectors = encode(model, texts, {2: HIDDEN, 4: HIDDEN})
    teacher = torch.tanh(vectors[2] @ torch.randn(HIDDEN, width, generator=torch.Generator().manual_seed(0)) / 8)
    found = fit_projections(model, texts, [2, 4], target=teacher)
    turned = found[2](vectors[2])
    assert predicted(turned[:, :8], teacher) > 0.95 * best_of_rank(vectors[2], teacher, 8)
    assert torch.linalg.matrix_rank(found[2].encode.double()) == HIDDEN and turned.std(0).min() > 0
    assert found[2].encode.norm() == pytest.approx(HIDDEN**0.5, rel=1e-4)
    expected = fit_projections(model, texts, [4], kind="centred")[4].encode
    torch.testing.assert_close(found[4].encode, expected)


@pytest.mark.parametrize("centred", [False, True])
def test_a_projection_is_a_dense(centred, encoder):
    """What an export folds into its linear map: weight and bias give the same first coordinates."""
    model = encoder("bert")
    projection = fit_projections(model, TEXTS, [2], kind="centred" if centred else "pca")[2]
    features = model.preprocess(TEXTS[:5])
    with torch.no_grad():
        plain = taps(model, features, [2, 4])
        turned = taps(model, features, [2, 4], {2: projection})
    weight, bias = projection.weight(8), projection.bias(8)
    assert (bias is not None) == centred
    options = dict(activation_function=None, bias=centred, init_weight=weight, init_bias=bias)
    dense = Dense(HIDDEN, 8, **options)
    served = dense({"sentence_embedding": plain[2]})["sentence_embedding"]
    torch.testing.assert_close(turned[2][:, :8], served, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[4], plain[4], rtol=0, atol=0)


def test_the_model_is_left_as_it_was(encoder):
    """Dropout is off while components are taken, and on again after."""
    model = encoder("bert").train()
    found = fit_projections(model, TEXTS, [4])[4]
    assert model.training
    torch.testing.assert_close(found.encode.abs(), fit_projections(model.eval(), TEXTS, [4])[4].encode.abs())


def test_bad_input(encoder):
    model = encoder("bert")
    with pytest.raises(ValueError, match="expected texts to take projections from, got none"):
        fit_projections(model, [], [4])
    with pytest.raises(ValueError, match="kind must be aligned, centred or pca, got 'random'"):
        fit_projections(model, TEXTS, [2], kind="random")
    with pytest.raises(ValueError, match=r"the target's embeddings of 90 texts, got \[89, 4\]"):
        fit_projections(model, TEXTS, [2], target=torch.ones(89, 4))
    with pytest.raises(LadderError, match="expected some of 1 to 4"):
        fit_projections(model, TEXTS, [5])
    for turn, mean in ((torch.eye(3, 4), None), (torch.ones(4), None), (torch.eye(4), torch.ones(3))):
        with pytest.raises(ValueError, match=r"expected encode \[H, H\] and mean \[H\]"):
            Projection(turn, mean)
    same = fit_projections(model, ["w9"] * 3, [2, 4])  # one direction only: still a basis
    torch.testing.assert_close(same[4].encode.mT @ same[4].encode, torch.eye(HIDDEN), rtol=0, atol=1e-5)
    assert same[2].encode.isfinite().all()


@pytest.mark.parametrize("flatten", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("width", [8, 100])
def test_the_alignment_is_the_balanced_basis(flatten, width):
    """Against the closed form of reduced-rank regression: the eigenvectors of what B predicts, B^T C B."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)).Q
    mix = torch.linspace(2, 0.3, HIDDEN, dtype=torch.float64)[:, None] * mix
    vectors = torch.randn(400, HIDDEN, generator=generator, dtype=torch.float64) @ mix
    target = torch.tanh(vectors @ torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64) / 4)
    encode, mean = module._aligned(vectors, target, flatten, centred=True)
    inputs, wanted = vectors - vectors.mean(0), target - target.mean(0)
    own = inputs * (module.OWN * (wanted.square().sum() / inputs.square().sum()).sqrt())
    wanted = torch.cat((wanted, own), 1)
    covariance = inputs.mT @ inputs / 400
    ridge = module.RIDGE * covariance.diagonal().mean() * torch.eye(HIDDEN, dtype=torch.float64)
    predicts = torch.linalg.solve(covariance + ridge, inputs.mT @ wanted / 400)
    power, components = torch.linalg.eigh(predicts.mT @ covariance @ predicts)
    power, components = power.flip(0)[:HIDDEN], components.flip(1)[:, :HIDDEN]
    expected = predicts @ components * power ** (-flatten / 2)
    signs = (encode * expected).sum(0).sign()
    torch.testing.assert_close(encode * signs, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean, vectors.mean(0))
