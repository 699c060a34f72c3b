"""StarbucksLoss against losses computed by hand from models that are really shallower, and its gradients."""

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, normalize

from nestling.embed.losses import StarbucksLoss
from nestling.embed.taps import taps
from nestling.ladder import Ladder

from .families import HIDDEN, LAYERS, some_texts

CUPS = Ladder.parse("1x8,2x16,4x32")


def columns(model, count=3, size=6, **options):
    return [model.preprocess(some_texts(size, seed), **options) for seed in range(count)]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def total(parts) -> torch.Tensor:
    return torch.stack(list(parts.values())).sum()


def vectors(model, features) -> dict[int, list[torch.Tensor]]:
    """Pooled vectors by depth from hidden states of one plain forward of BERT: mean pooling, written out."""
    found = {}
    for column in features:
        inputs = {key: value for key, value in column.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
        states = model[0].model(**inputs, output_hidden_states=True).hidden_states
        mask = column["attention_mask"][..., None].float()
        for depth in range(1, LAYERS + 1):
            found.setdefault(depth, []).append((states[depth] * mask).sum(1) / mask.sum(1))
    return found


def info_nce(embeddings, scale=20.0):
    """In-batch contrast of the first column with all texts of the others; the positive is the second column's."""
    queries, *others = [normalize(e, dim=-1) for e in embeddings]
    return cross_entropy(queries @ torch.cat(others).T * scale, torch.arange(len(queries)))


def test_all_parts_by_hand(encoder):
    model = encoder("bert")
    features = columns(model)
    loss = StarbucksLoss(model, losses.MultipleNegativesRankingLoss(model), CUPS, kl_weight=2.0, weights={"2x16": 3.0})
    parts = loss(features, None)
    assert list(parts) == ["1x8", "kl_1x8", "2x16", "kl_2x16", "4x32"]

    by_depth = vectors(model, features)
    unit = {cup: [normalize(v[:, : cup.dims], dim=-1) for v in by_depth[cup.layers]] for cup in CUPS}
    scores = {cup: u[0] @ torch.cat(u[1:]).T for cup, u in unit.items()}
    teacher = (scores[CUPS.full] / 0.05).softmax(-1).detach()
    expected = {}
    for cup in CUPS:
        weight = 3.0 if cup.name == "2x16" else 1.0
        expected[cup.name] = weight * info_nce([v[:, : cup.dims] for v in by_depth[cup.layers]])
        if cup != CUPS.full:
            student = (scores[cup] / 0.05).log_softmax(-1)
            expected[f"kl_{cup.name}"] = 2 * weight * kl_div(student, teacher, reduction="batchmean")
    torch.testing.assert_close(dict(parts), {name: expected[name] for name in parts}, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(model, total(parts)).values(), gradients(model, total(expected)).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def released_sts_loss(model, features, cups, weight=1.0, temperature=0.3):
    """The released STS training loss of arXiv 2410.13230: contrast at each pair of depth and width, and for all but the
    full pair a divergence between softmaxes over coordinates, to which ``temperature`` is but a factor. The teacher is
    not detached."""
    by_depth = vectors(model, features)
    whole = torch.cat(by_depth[cups.full.layers])
    result = info_nce(by_depth[cups.full.layers])
    for cup in [cup for cup in cups if cup != cups.full]:
        cut = [v[:, : cup.dims] for v in by_depth[cup.layers]]
        p, q = torch.cat(cut).softmax(-1), whole[:, : cup.dims].softmax(-1)
        result = result + info_nce(cut) + temperature * weight * (q * (q / p).log()).sum() / len(whole)
    return result


@pytest.mark.parametrize("count", [2, 3])
def test_the_released_sts_loss(count, encoder):
    model = encoder("bert").double()
    features = columns(model, count)
    base = losses.MultipleNegativesRankingLoss(model)
    loss = StarbucksLoss(model, base, CUPS, kl="coordinate", kl_weight=0.3, detach_teacher=False)
    mine, theirs = total(loss(features, None)), released_sts_loss(model, features, CUPS)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    ours, released = gradients(model, mine), gradients(model, released_sts_loss(model, features, CUPS))
    assert ours.keys() == released.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], released[name], rtol=0, atol=1e-6)
