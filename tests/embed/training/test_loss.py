"""StarbucksLoss against losses computed by hand from models that are really shallower, and its gradients."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, normalize

from nestling.embed.ladder import Ladder
from nestling.embed.model.projection import Projection
from nestling.errors import LadderError

from ..families import FAMILIES, HIDDEN, LAYERS, some_texts
from ..ways import loss_of

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
        inputs = {
            key: value for key, value in column.items() if key in ("input_ids", "attention_mask", "token_type_ids")
        }
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
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, kl_weight=2.0, weights={"2x16": 3.0})
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
    for mine, theirs in zip(
        gradients(model, total(parts)).values(), gradients(model, total(expected)).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_released_retrieval_loss(encoder):
    """Dot products, temperature 1, rows of queries over all passages of the batch, teacher detached."""
    model = encoder("bert", "cls").double()
    features = columns(model)
    base = losses.MultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=lambda a, b: a @ b.mT)
    loss = loss_of(model, base, CUPS, temperature=1.0, normalize=False)

    expected, teacher = 0, None
    states = [
        model[0].model(**{k: f[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
        for f in features
    ]
    for cup in reversed(CUPS.sizes):
        queries, *passages = [s.hidden_states[cup.layers][:, 0, : cup.dims] for s in states]
        scores = queries @ torch.cat(passages).T
        expected = expected + cross_entropy(scores, torch.arange(len(queries)))
        if teacher is None:
            teacher = scores.softmax(-1).detach()
        else:
            expected = expected + kl_div(scores.log_softmax(-1), teacher, reduction="batchmean")
    mine = total(loss(features, None))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    for a, b in zip(gradients(model, mine).values(), gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


LABELLED = {
    "CoSENTLoss": (2, torch.linspace(0, 1, 6)),
    "AnglELoss": (2, torch.linspace(0, 1, 6)),
    "CosineSimilarityLoss": (2, torch.linspace(0, 1, 6)),
    "ContrastiveLoss": (2, torch.tensor([0, 1, 1, 0, 1, 0])),
    "OnlineContrastiveLoss": (2, torch.tensor([0, 1, 1, 0, 1, 0])),
    "MarginMSELoss": (3, torch.linspace(-1, 1, 6)),
    "DistillKLDivLoss": (3, torch.rand(6, 2, generator=torch.Generator().manual_seed(0))),
    "BatchAllTripletLoss": (1, torch.tensor([0, 0, 1, 1, 2, 2])),
    "BatchHardTripletLoss": (1, torch.tensor([0, 0, 1, 1, 2, 2])),
    "BatchSemiHardTripletLoss": (1, torch.tensor([0, 0, 1, 1, 2, 2])),
    "BatchHardSoftMarginTripletLoss": (1, torch.tensor([0, 0, 1, 1, 2, 2])),
}
UNLABELLED = {
    "MultipleNegativesRankingLoss": 2,
    "MultipleNegativesSymmetricRankingLoss": 2,
    "TripletLoss": 3,
    "GlobalOrthogonalRegularizationLoss": 2,
}


@pytest.mark.filterwarnings("ignore:The MultipleNegativesSymmetricRankingLoss:DeprecationWarning")
@pytest.mark.parametrize("name", [*LABELLED, *UNLABELLED])
def test_every_base_loss_at_every_cup(name, encoder):
    """The value at a cup is the base loss of the truncated and normalised vectors, whatever the base loss is."""
    model = encoder("bert")
    base = getattr(losses, name)(model)
    count, labels = LABELLED[name] if name in LABELLED else (UNLABELLED[name], None)
    features = columns(model, count)
    parts = loss_of(model, base, CUPS)(features, labels)
    by_depth = vectors(model, features)
    for cup in CUPS:
        cut = [normalize(v[:, : cup.dims], dim=-1) for v in by_depth[cup.layers]]
        expected = base.compute_loss_from_embeddings(cut, labels)
        if isinstance(expected, dict):
            found = {
                key.removeprefix(f"{cup.name}_"): value for key, value in parts.items() if key.startswith(cup.name)
            }
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(parts[cup.name], expected, rtol=1e-4, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(model, total(parts)).values())


def test_one_column_is_ranked_against_itself(encoder):
    model = encoder("bert")
    features = columns(model, 1, size=5)
    base = losses.GlobalOrthogonalRegularizationLoss(model)
    parts = loss_of(model, base, CUPS)(features)
    by_depth = {depth: v[0] for depth, v in vectors(model, features).items()}

    def rows(cup):
        unit = normalize(by_depth[cup.layers][:, : cup.dims], dim=-1)
        return [torch.stack([unit[i] @ unit[j] for j in range(5) if j != i]) / 0.05 for i in range(5)]

    for cup in CUPS.sizes[:-1]:
        pairs = zip(rows(CUPS.full), rows(cup), strict=True)
        expected = torch.stack([kl_div(s.log_softmax(0), t.softmax(0), reduction="sum") for t, s in pairs]).mean()
        torch.testing.assert_close(parts[f"kl_{cup.name}"], expected, rtol=1e-4, atol=1e-6)


def test_one_text_has_nothing_to_follow(encoder):
    model = encoder("bert")
    for count in (1, 2):
        base = losses.GlobalOrthogonalRegularizationLoss(model)
        parts = loss_of(model, base, CUPS)(columns(model, count, size=1))
        assert all(parts[f"kl_{cup.name}"] == 0 for cup in CUPS.sizes[:-1])


@pytest.mark.parametrize("options", [{}, {"cascade": True}])
def test_where_the_gradient_of_the_kl_goes(options, encoder):
    """Never to the teacher, which is the full cup or the next larger one."""
    model = encoder("bert")
    features = columns(model)
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, **options)
    parts = loss(features, None)
    found = gradients(model, parts["kl_1x8"])

    def layer(number):
        return sum(float(g.abs().sum()) for name, g in found.items() if f".layer.{number - 1}." in name)

    assert layer(1) > 0
    assert layer(2) == layer(4) == 0
    by_depth = vectors(model, features)
    student, teacher = CUPS.sizes[0], CUPS.sizes[1] if "cascade" in options else CUPS.full
    scores = []
    for cup in (student, teacher):
        queries, *others = [normalize(v[:, : cup.dims], dim=-1) for v in by_depth[cup.layers]]
        scores.append(queries @ torch.cat(others).T / 0.05)
    expected = kl_div(scores[0].log_softmax(-1), scores[1].softmax(-1), reduction="batchmean")
    torch.testing.assert_close(parts["kl_1x8"], expected, rtol=1e-4, atol=1e-6)


def test_several_cups_of_one_depth(encoder):
    model = encoder("bert")
    features = columns(model, 2)
    cups = Ladder.parse("2x4,2x16,4x8,4x32")
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), cups)
    assert loss.represent(dict(features[0]))["sentence_embedding"].shape == (6, 16 + 32)
    by_depth = vectors(model, features)
    parts = loss(features, None)
    for cup in cups:
        expected = info_nce([v[:, : cup.dims] for v in by_depth[cup.layers]])
        torch.testing.assert_close(parts[cup.name], expected, rtol=1e-5, atol=1e-6)


def test_a_cascade_over_cups_that_are_not_zipped(encoder):
    """A teacher is never narrower than its student."""
    model = encoder("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    loss = loss_of(model, base, "1x8,1x16,2x4,3x12,4x32", cascade=True)
    followed = {student.name: teacher.name for student, teacher in loss.teachers.items()}
    assert followed == {"1x8": "1x16", "1x16": "4x32", "2x4": "3x12", "3x12": "4x32"}
    assert total(loss(columns(model, 2))).isfinite()


OPTIONS = [{"cascade": True, "weights": {"4x32": 2.5, "1x8": 0.5}}, {"kl_weight": 0}]


@pytest.mark.parametrize("family, options", [*((family, {}) for family in FAMILIES), *(("bert", o) for o in OPTIONS)])
def test_cached_gradients_are_the_direct_ones(family, options, encoder):
    model = encoder(family).double()
    features = columns(model, size=7)
    direct = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, **options)
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    cached = loss_of(model, base, CUPS, **options)
    one, other = direct(features, None), cached(features, None)
    assert list(one) == list(other)
    torch.testing.assert_close(one, other)
    expected, found = gradients(model, total(one) * 0.7), gradients(model, total(other) * 0.7)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(cached(features, None), {name: part.detach() for name, part in one.items()})


zipped = st.sets(st.tuples(st.integers(1, LAYERS), st.integers(1, HIDDEN)), max_size=4)


@given(zipped, st.integers(2, 4), st.integers(2, 6), st.integers(1, 7), st.floats(0.1, 5), st.randoms())
@settings(deadline=None, max_examples=25)
def test_any_ladder_in_any_batches(tiny_bert, cups, count, size, mini_batch, weight, random):
    """Whatever the ladder, the columns and the mini-batches: caching changes nothing, nor does the texts' order."""
    cups = Ladder(cups | {(LAYERS, HIDDEN)})
    texts = [some_texts(size, seed) for seed in range(count)]
    order = random.sample(range(size), size)
    results = []
    for kind, options, rows in (
        (losses.MultipleNegativesRankingLoss, {}, range(size)),
        (losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": mini_batch}, range(size)),
        (losses.MultipleNegativesRankingLoss, {}, order),
    ):
        features = [tiny_bert.preprocess([column[row] for row in rows]) for column in texts]
        loss = loss_of(tiny_bert, kind(tiny_bert, **options), cups, weights={cups.sizes[0].name: weight})
        parts = loss(features)
        assert all(value >= -1e-9 for name, value in parts.items() if name.startswith("kl_"))
        results.append((parts, gradients(tiny_bert, total(parts))))
    parts, found = results[0]
    for other_parts, other in results[1:]:
        torch.testing.assert_close(other_parts, parts, rtol=1e-6, atol=1e-8)
        assert other.keys() == found.keys()
        for name in found:
            torch.testing.assert_close(other[name], found[name], rtol=1e-4, atol=1e-6)


def test_cached_gradients_with_dropout(encoder):
    """The second forward draws the dropout of the first: as if there had been one."""
    model = encoder("bert").train()
    features = columns(model, 2)
    direct = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=6)

    def separately(seed):
        """Each column in a forward of its own, as the cached loss embeds them."""
        torch.manual_seed(seed)
        return total(direct._parts([[direct.represent(f)["sentence_embedding"]] for f in features], None, False))

    one = separately(3)
    expected = gradients(model, one)
    torch.manual_seed(3)
    other = total(loss_of(model, base, CUPS)(features, None))
    found = gradients(model, other)
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert separately(4).item() != pytest.approx(one.item(), rel=1e-3)


def test_features_are_left_alone(encoder):
    model = encoder("bert", include_prompt=False)
    features = columns(model, 2, prompt="w5 w6 ")
    before = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in f.items()} for f in features]
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)
    first, second = loss(features, None), loss(features, None)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for was, now in zip(before, features, strict=True):
        assert was.keys() == now.keys()
        for key, value in was.items():
            assert torch.equal(value, now[key]) if isinstance(value, torch.Tensor) else value == now[key]


def table(rows=40, width=50) -> torch.Tensor:
    """Teacher embeddings: wider than the model, not normalised."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("cascade", [False, True])
def test_a_teacher_of_another_width(cascade, cached, encoder):
    """It teaches every cup, the full one too; with a cascade, only that one. Labels say which rows texts are."""
    model, rows = encoder("bert"), table()
    features = columns(model, 3)
    labels = torch.randint(40, (6, 3), generator=torch.Generator().manual_seed(1))
    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    base = kind(model, mini_batch_size=4) if cached else kind(model)
    loss = loss_of(model, base, CUPS, teacher=rows, temperature=0.1, cascade=cascade, kl_weight=0.5)
    parts = loss(features, labels)
    assert [name for name in parts if name.startswith("kl_")] == ["kl_1x8", "kl_2x16", "kl_4x32"]
    by_depth = vectors(model, features)

    def scores(embeddings):
        queries, *others = [normalize(e, dim=-1) for e in embeddings]
        return queries @ torch.cat(others).T

    external = scores([rows[labels[:, column]] for column in range(3)])
    for number, cup in enumerate(CUPS):
        student = scores([v[:, : cup.dims] for v in by_depth[cup.layers]])
        teacher = external
        if cascade and cup != CUPS.full:
            larger = CUPS.sizes[number + 1]
            teacher = scores([v[:, : larger.dims] for v in by_depth[larger.layers]]).detach()
        expected = 0.5 * kl_div((student / 0.1).log_softmax(-1), (teacher / 0.1).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(parts[f"kl_{cup.name}"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[cup.name], info_nce([v[:, : cup.dims] for v in by_depth[cup.layers]]))
    assert loss.state_dict().keys() == loss_of(model, base, CUPS).state_dict().keys()  # the table is not saved


@pytest.mark.parametrize(
    "labels, reason",
    [
        (None, r"expected integers of shape \[6, 2\] \(texts, columns\), got none"),
        (torch.rand(6), r"got torch.float32 \[6\]"),
        (torch.zeros(6, 3, dtype=torch.long), r"got torch.int64 \[6, 3\]"),
        (torch.full((6, 2), 40), "name rows 40 to 40 of a teacher that has 40"),
        (torch.full((6, 2), -1), "name rows -1 to -1"),
    ],
)
def test_labels_that_are_no_rows_of_the_teacher(labels, reason, encoder):
    model = encoder("bert")
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, teacher=table())
    with pytest.raises(ValueError, match=reason):
        loss(columns(model, 2), labels)


def test_losses_that_lack_their_labels(encoder):
    model = encoder("bert")
    features = columns(model, 2)
    for name in ("CoSENTLoss", "CosineSimilarityLoss", "OnlineContrastiveLoss"):
        with pytest.raises(ValueError, match=f"{name} needs labels and there are none"):
            loss_of(model, getattr(losses, name)(model), CUPS)(features, None)
    taught = loss_of(model, losses.CoSENTLoss(model), CUPS, teacher=table())
    with pytest.raises(ValueError, match="those of a StarbucksLoss with a teacher are the teacher's"):
        taught(features, torch.zeros(6, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected labels for 6 texts, got labels \[5\]"):
        loss_of(model, losses.CoSENTLoss(model), CUPS)(features, torch.rand(5))


@pytest.mark.parametrize(
    "cups, reason",
    [
        ("1x8,2x16", "the full size 4x32 is missing"),
        ("1x8,5x32", "5x32 is deeper than the model"),
        ("1x33,4x32", "1x33 is wider than the model"),
        ("1x8,1x8,4x32", "twice"),
        ("small", "'small' is no size"),
    ],
)
def test_ladders_that_do_not_fit(cups, reason, encoder):
    model = encoder("bert")
    with pytest.raises(LadderError, match=reason):
        loss_of(model, losses.MultipleNegativesRankingLoss(model), cups)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"kl_weight": float("nan")}, "kl_weight=nan"),
        ({"weights": {"4x32": 0.0}}, r"weights\[4x32\]=0.0"),
        ({"weights": {"6x128": 2.0}}, "6x128 is not in the ladder"),
        ({"teacher": torch.rand(3)}, r"expected teacher embeddings \[N, D\] of floats, got torch.float32 \[3\]"),
        ({"teacher": torch.ones(3, 3, dtype=torch.long)}, "of floats, got torch.int64"),
        ({"teacher": torch.rand(3, 3), "kl_weight": 0}, "kl_weight=0 with a teacher: nothing follows it"),
    ],
)
def test_options_out_of_range(options, reason, encoder):
    model = encoder("bert")
    with pytest.raises(ValueError, match=reason):
        loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, **options)


def test_losses_that_embed_by_themselves(encoder):
    model = encoder("bert")
    guided = losses.CachedGISTEmbedLoss(model, encoder("bert"))
    for base in (guided, losses.MegaBatchMarginLoss(model, use_mini_batched_version=False), nn.MSELoss()):
        with pytest.raises(ValueError, match=f"{type(base).__name__} embeds texts by itself"):
            loss_of(model, base, CUPS)
    with pytest.raises(ValueError, match="EmbedDistillLoss compares coordinates .* as its teacher"):
        loss_of(model, losses.EmbedDistillLoss(model), CUPS)


def test_projections_come_before_the_cut(encoder):
    model = encoder("bert")
    features = columns(model, 2)
    turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)))[0]
    shift = torch.linspace(-1, 1, HIDDEN)
    projected = {2: Projection(turn, shift), 4: Projection(turn)}
    loss = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, projections=projected)
    parts, plain = loss(features), loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)(features)
    by_depth = vectors(model, features)
    torch.testing.assert_close(parts["2x16"], info_nce([((v - shift) @ turn)[:, :16] for v in by_depth[2]]))
    torch.testing.assert_close(parts["1x8"], plain["1x8"])
    torch.testing.assert_close(parts["4x32"], plain["4x32"], rtol=1e-4, atol=1e-5)  # nothing changes at full width
    assert not [name for name, p in loss.named_parameters() if "projection" in name and p.requires_grad]
    assert loss.get_config_dict()["projected_layers"] == [2, 4]


@pytest.mark.parametrize("projection", [{3: Projection(torch.eye(HIDDEN))}, {4: Projection(torch.eye(8))}])
def test_projections_that_no_cup_takes(projection, encoder):
    model = encoder("bert")
    with pytest.raises(ValueError, match=r"no size of .* takes a projection of (32|8) coordinates at depth"):
        loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, projections=projection)


def test_a_teacher_in_a_file(encoder, tmp_path):
    model, rows = encoder("bert"), table()
    np.save(tmp_path / "teacher.npy", rows.numpy())
    base, labels = losses.MultipleNegativesRankingLoss(model), torch.arange(12).view(6, 2)
    mapped = np.load(tmp_path / "teacher.npy", mmap_mode="c")
    parts = [loss_of(model, base, CUPS, teacher=t)(columns(model, 2), labels) for t in (rows, mapped)]
    torch.testing.assert_close(*parts, rtol=0, atol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_a_compiled_model_trains(cached, encoder):
    """Compiled and called before the loss gets it, as for an evaluation before the training."""
    model = encoder("bert")
    features = columns(model, 2)
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    loss = loss_of(model, base if cached else losses.MultipleNegativesRankingLoss(model), CUPS)
    expected = gradients(model, total(loss(features)))
    loss.model = torch.compile(model, backend="eager")
    loss.model(dict(features[0]))
    for _ in range(2):
        found = gradients(model, total(loss(features)))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_equal_texts_and_empty_ones(encoder):
    """All vectors of a column alike: finite losses, and gradients."""
    model = encoder("bert")
    for texts in (["w9"] * 4, [""] * 4):
        features = [model.preprocess(texts), model.preprocess(texts)]
        parts = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)(features)
        assert all(part.isfinite() for part in parts.values())
        assert parts["kl_1x8"].item() == pytest.approx(0, abs=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients(model, total(parts)).values())


def test_half_precision_is_divided_in_full(encoder):
    """Vectors in bf16 are cut, normalised and compared in fp32."""
    model = encoder("bert")
    features = columns(model, 2)
    exact = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)(features)
    model.bfloat16()
    parts = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS)(features)
    assert all(part.dtype == torch.float32 for part in parts.values())
    torch.testing.assert_close(total(parts), total(exact), rtol=0.1, atol=0.1)


def test_what_a_model_card_says(encoder):
    model = encoder("bert")
    base = losses.MultipleNegativesRankingLoss(model)
    config = loss_of(model, base, "1x8,4x32", weights={"4x32": 2}, cascade=True).get_config_dict()
    assert config["loss"] is base and config["cups"] == "1x8,4x32" and config["weights"] == {"4x32": 2}
    assert config["temperature"] == 0.05 and config["cascade"] is True
    assert "temperature" not in loss_of(model, base, "4x32", kl_weight=0).get_config_dict()
    assert "2410.13230" in loss_of(model, base, "4x32").citation


@pytest.mark.parametrize("cached", [False, True])
def test_the_stock_trainer(cached, encoder, tmp_path):
    """SentenceTransformerTrainer sums the parts and logs a curve for each; labels of a teacher get through."""
    model = encoder("bert")
    texts, rows = some_texts(16), list(range(16))
    data = Dataset.from_dict(
        {"anchor": texts, "positive": texts[::-1], "label": [[i, j] for i, j in zip(rows, rows[::-1], strict=True)]}
    )
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    base = base if cached else losses.MultipleNegativesRankingLoss(model)
    loss = loss_of(model, base, CUPS, teacher=table(16))
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=8, per_device_eval_batch_size=8, logging_steps=1,
        eval_strategy="steps", eval_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ["1x8", "kl_1x8", "2x16", "kl_2x16", "4x32", "kl_4x32"]
    for entry in steps:
        assert sum(entry[name] for name in names) == pytest.approx(entry["loss"], abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "StarbucksLoss" in card and type(base).__name__ in card and '"cups": "1x8,2x16,4x32"' in card
    assert "2410.13230" in card
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert sum(evaluated[f"eval_{name}"] for name in names) == pytest.approx(evaluated["eval_loss"], abs=1e-2)


def test_a_teacher_alone(encoder):
    """Without a loss there is the KL of every cup, the full one's too."""
    model = encoder()
    table = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    loss = loss_of(model, None, "1x8,4x32", teacher=table)
    features, rows = [model.preprocess(some_texts(4))], torch.arange(4)[:, None]
    parts = loss(features, rows)
    assert set(parts) == {"kl_1x8", "kl_4x32"}
    whole = loss_of(model, losses.MultipleNegativesRankingLoss(model), "1x8,4x32", teacher=table)
    pair = whole([features[0], features[0]], rows.expand(-1, 2))
    assert set(pair) == {"1x8", "kl_1x8", "4x32", "kl_4x32"}
    with pytest.raises(ValueError, match="nothing holds the full size where it is"):
        loss_of(model, None, "1x8,4x32")
