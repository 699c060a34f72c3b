"""Parts of like length: the same vectors and gradients as a forward a column, of fewer tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.embed.training.lengths import PARTS, ROWS, embed_by_length

from ..families import FAMILIES


def texts(count: int, longest: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(20)}" for _ in range(rng.randint(0, longest))) for _ in range(count)]


def compared(model, columns):
    """Vectors and gradients of both ways, which must be equal, and the shapes of the forwards of the first."""
    model.double()
    shapes, results = [], []
    hook = model[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0]["input_ids"].shape)))
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(c["attention_mask"]), 1, generator=rng).double() for c in columns]
    for way in (embed_by_length, lambda represent, given: [represent(dict(c))["sentence_embedding"] for c in given]):
        model.zero_grad()
        made = way(model, columns)
        sum((vectors * weight).sum() for vectors, weight in zip(made, weights, strict=True)).backward()
        results.append((made, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        hook.remove()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    return shapes


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, side, encoder):
    model = encoder(family, side=side)
    columns = [model.preprocess(texts(20, longest, longest)) for longest in (4, 30, 9)]
    shapes = compared(model, columns)
    assert len(shapes) == 60 // ROWS


def test_most_padding_is_gone(encoder):
    """Short texts beside long ones, as captions beside passages."""
    model = encoder("bert")
    columns = [model.preprocess(texts(64, longest, longest)) for longest in (4, 30, 4)]
    shapes = compared(model, columns)
    real = sum(int(column["attention_mask"].sum()) for column in columns)
    padded = sum(column["attention_mask"].numel() for column in columns)
    assert len(shapes) == PARTS and sum(rows for rows, _ in shapes) == 192
    assert sum(rows * width for rows, width in shapes) < 1.4 * real < 0.8 * padded


@settings(max_examples=20)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_number_of_texts(tiny_bert, counts, seed):
    """Columns of different numbers of texts cannot be put together, and are embedded one by one."""
    columns = [tiny_bert.preprocess(texts(count, 12, seed + n)) for n, count in enumerate(counts)]
    shapes = compared(tiny_bert, columns)
    assert sum(rows for rows, _ in shapes) == sum(counts)


def test_prompts_that_are_not_pooled(encoder):
    """Their length is a number for the whole batch, and no row of it."""
    model = encoder("bert", include_prompt=False)
    columns = [model.preprocess(texts(40, longest, longest), prompt="w5 w6 ") for longest in (4, 30)]
    assert "prompt_length" in columns[0]
    assert len(compared(model, columns)) == 80 // ROWS
