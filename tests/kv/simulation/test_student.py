"""The masked student against the cache that really stores less, and what of it trains."""

import copy
from dataclasses import replace

import pytest
import torch

from nestling import kv
from nestling.errors import TrainingError, UnsupportedModelError
from nestling.kv.allocation.table import bits_of_ranks, by_coordinate
from nestling.kv.cache import drift
from nestling.kv.integration.attach import attach, cached
from nestling.kv.simulation.student import Student
from nestling.losses import IGNORED, kl_divergence

from ..families import FAMILIES, nested_cache, tiny_model


def random_ranks(adapter, batch: int, seed: int = 0) -> torch.Tensor:
    """The bits ``[B, 2, L, Hkv, blocks]`` of ranks in multiples of 8."""
    layers, heads, width = adapter.shape
    choices = torch.tensor([*range(8, width, 8), width])
    picks = torch.randint(0, len(choices), (batch, 2, layers, heads), generator=torch.Generator().manual_seed(seed))
    return bits_of_ranks(choices[picks], width)


def eight(batch: int) -> torch.Tensor:
    """Ranks of 8 for heads of 16."""
    return torch.tensor([16, 0]).repeat(batch, 2, 3, 2, 1)


@pytest.mark.parametrize("sinks, window", [(0, 0), (2, 8)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_do_what_the_cache_does(fitted, ids, family, sinks, window, monkeypatch):
    """Row by row, each at ranks of its own, against a cache that is read token by token; means of keys drift."""
    monkeypatch.setattr(drift, "SPAN", 8)
    case = copy.copy(fitted(family))
    layers, heads, width = case.adapter.shape
    moves = torch.randn(layers, heads, 3, width, generator=torch.Generator().manual_seed(5))
    case.adapter = replace(case.adapter, drift=moves)
    student = Student(case.model, case.adapter, sinks=sinks, window=window).eval()
    ranks, text = random_ranks(case.adapter, 2), ids[:2, :48]
    ours = case.model.lm_head(student.hidden(text, ranks))
    for row in range(2):
        options = {
            "budget": kv.Allocation(*ranks[row], case.adapter.shape[2]),
            "sinks": sinks,
            "window": window,
            "exact_prompt": False,
        }
        cache = nested_cache(case.model, case.adapter, **options)
        read = [case.model(input_ids=t, **cached(case.model, cache)).logits for t in text[row : row + 1].split(1, 1)]
        theirs = torch.cat(read, 1)[0]
        torch.testing.assert_close(ours[row], theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("sinks, window", [(0, 0), (2, 8)])
@torch.no_grad()
def test_sixteen_bits_or_none_are_ranks_and_eight_are_nearly_all(fitted, ids, sinks, window):
    case = fitted("qwen3")
    student = Student(case.model, case.adapter, sinks=sinks, window=window).eval()
    torch.nn.init.normal_(student.bases.rotation.x)
    bits = random_ranks(case.adapter, 2)
    of_coordinates, bases = by_coordinate(bits, 24), student.bases
    coded, projected = (  # both ways to read ranks
        student.logits(ids[:2], student.reading(cut))
        for cut in (bases.coded(of_coordinates), bases.projected(of_coordinates > 0))
    )
    torch.testing.assert_close(coded, projected, rtol=1e-3, atol=1e-3)
    exact = student.teacher(ids[:2])
    torch.testing.assert_close(student.hidden(ids[:2], torch.full_like(bits, 16)), exact)
    off = [float((student.hidden(ids[:2], torch.full_like(bits, b)) - exact).norm()) for b in (8, 4, 3, 2, 1)]
    assert off == sorted(off) and off[0] < 0.05 * off[-1]


def test_bits_train_rotations(fitted, ids):
    """Every rotation of what is quantised has a gradient; one that is read in full has none."""
    case = fitted("llama-gqa")
    student = Student(case.model, case.adapter).train()
    bits = torch.full((1, 2, *case.adapter.shape[:2], 2), 2)
    bits[0, 0, 1] = 16
    (gradient,) = torch.autograd.grad(student(ids[:1], bits)["loss"], student.bases.rotation.x)
    size = gradient.flatten(3).norm(dim=-1)
    assert torch.isfinite(gradient).all() and (size[0, 1] == 0).all()
    size[0, 1] = 1
    assert (size > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_adapter_and_full_rank_is_the_model(fitted, ids, family):
    case = fitted(family)
    student = Student(case.model, case.adapter).eval()
    for side, encode in student.bases.encodes().items():
        torch.testing.assert_close(encode, case.adapter.encode[side], rtol=1e-6, atol=1e-6)
    torch.nn.init.normal_(student.bases.rotation.x)
    full = torch.full_like(random_ranks(case.adapter, 2), 16)
    torch.testing.assert_close(student.hidden(ids[:2], full), student.teacher(ids[:2]), rtol=1e-3, atol=1e-3)
    assert float(student(ids[:2], full)["kl"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(ids, fitted, family):
    model, adapter = tiny_model(family).requires_grad_(False), fitted(family).adapter
    attach(model)
    student = Student(model, adapter, sinks=2, window=8, kl_weight=0.5, ce_weight=0.5).train()
    ranks, found = random_ranks(adapter, 4), []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers 5.23 has given it another name
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            enable = getattr(model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        student.zero_grad()
        try:
            student(ids[:4], ranks)["loss"].backward()
        except UnsupportedModelError as error:
            assert family == "partial-rotary" and "without gradient checkpointing" in str(error)
            return
        found.append(student.bases.rotation.x.grad.clone())
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_a_step_changes_rotations_only_and_they_stay_rotations(fitted, ids):
    case = fitted("llama-gqa")
    model = tiny_model("llama-gqa").requires_grad_(False)
    attach(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    student = Student(model, case.adapter).train()
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained == ["bases.rotation.x"] == list(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = student(ids[:4], eight(4))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    u = student.bases.rotation().detach().double()
    eye = torch.eye(u.shape[-1], dtype=torch.float64).expand_as(u)
    torch.testing.assert_close(u @ u.mT, eye, rtol=0, atol=1e-5)
    assert float((u - eye).abs().max()) > 0.01
    encodes = student.bases.encodes()
    back = torch.linalg.inv(case.adapter.encode["key"].double()) @ encodes["key"].double()
    torch.testing.assert_close(back, u[0], rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences(fitted, ids):
    """Through attention, rotation, head and the whole model."""
    adapter = fitted("llama-gqa").adapter
    model = tiny_model("llama-gqa", dtype=torch.float64).requires_grad_(False)
    attach(model)
    student = Student(model, adapter, sinks=1, window=4).double().train()
    ranks = random_ranks(adapter, 1)
    torch.nn.init.normal_(student.bases.rotation.x, std=0.1)
    student(ids[:1, :16], ranks)["loss"].backward()
    gradient = student.bases.rotation.x.grad
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    direction *= student.bases.free  # coordinates of one step are not rotated among each other
    assert not gradient[:, :, :, ~student.bases.free].any()
    step, values = 1e-3, []  # norms compute in fp32, whatever the dtype of the model
    with torch.no_grad():
        start = student.bases.rotation.x.clone()
        for sign in (1, -1):
            student.bases.rotation.x.copy_(start + sign * step * direction)
            values.append(float(student(ids[:1, :16], ranks)["loss"]))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_labels_choose_what_counts(fitted, ids):
    case = fitted("llama-gqa")
    student = Student(case.model, case.adapter, kl_weight=0.5, ce_weight=0.5).train()
    text, ranks = ids[:2, :24], eight(2)
    labels = torch.full_like(text, IGNORED)
    labels[0, 5:9], labels[1, 20:] = text[0, 5:9], text[1, 20:]
    got = {name: value.detach() for name, value in student(text, ranks, labels).items()}
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    theirs = case.stock(input_ids=text).logits[rows, places].detach()
    ours = case.model.lm_head(student.hidden(text, ranks))[rows, places].detach()
    assert len(rows) == 8
    assert float(got["kl"]) == pytest.approx(float(kl_divergence(theirs, ours).mean()), rel=1e-4)
    ce = torch.nn.functional.cross_entropy(ours, text[rows, places + 1])
    assert float(got["ce"]) == pytest.approx(float(ce), rel=1e-4)
    assert float(got["loss"]) == pytest.approx(float(got["kl"] + got["ce"]) / 2, rel=1e-5)


def test_dropout_is_off_while_training(fitted):
    student = Student(tiny_model("llama-gqa", attention_dropout=0.5), fitted("llama-gqa").adapter)
    student.lm.add_module("extra", torch.nn.Dropout(0.5))
    student.train()
    assert student.lm.training and not student.lm.extra.training


def test_what_is_not_finite_is_named(fitted, ids):
    adapter = fitted("llama-gqa").adapter
    model = tiny_model("llama-gqa")
    attach(model)
    student, ranks = Student(model, adapter), eight(1)
    with torch.no_grad():
        student.bases.rotation.x[1, 2, 0, 0, 1] = torch.nan
    with pytest.raises(TrainingError, match="rotation of the values of layer 2 holds NaN"):
        student(ids[:1], ranks)
    student = Student(model, adapter)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(TrainingError, match="full model's hidden states hold NaN or infinity after layer 1"):
        student(ids[:1], ranks)
