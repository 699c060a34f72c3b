"""Cups and ladders: what is read, in which order, and what is refused with which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.embed.ladder import Ladder, Size
from nestling.errors import LadderError

PAPER = "2x32,4x64,6x128,8x256,10x512,12x768"
sizes = st.tuples(st.integers(1, 200), st.integers(1, 10_000))
ladders = st.sets(sizes, min_size=1, max_size=12).map(Ladder)


def test_the_paper():
    ladder = Ladder.parse(PAPER)
    assert str(ladder) == PAPER and ladder == Ladder.default(12, 768)
    assert ladder.full == Size(12, 768) and ladder.layers == (2, 4, 6, 8, 10, 12) and len(ladder) == 6
    assert ladder.check(12, 768) is ladder
    assert (
        ladder.named("6x128")
        == ladder.named((6, 128))
        == ladder.named(Size(6, 128))
        == ladder.sizes[2]
        == Size(6, 128)
    )
    assert Size(6, 128) in ladder and Size(6, 256) not in ladder
    assert Size(6, 256).name == str(Size(6, 256)) == "6x256"


@given(ladders)
def test_there_and_back(ladder):
    assert Ladder.parse(str(ladder)) == ladder == Ladder.parse(ladder)
    assert Ladder.parse(f" {str(ladder).upper().replace(',', ' , ')} ") == ladder
    assert Ladder.parse([cup.name for cup in ladder]) == ladder == Ladder.parse(reversed(ladder.sizes))
    assert Ladder.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder
    assert hash(Ladder(tuple(ladder))) == hash(ladder)
    assert list(ladder) == sorted(ladder, key=lambda cup: (cup.layers, cup.dims))
    assert all(Size.parse((cup.layers, cup.dims)) == Size.parse(cup.name) == Size.parse(cup) == cup for cup in ladder)


@given(ladders, st.integers(1, 200), st.integers(1, 10_000))
def test_a_ladder_fits_a_model_or_says_why_not(ladder, layers, dims):
    too_big = [cup for cup in ladder if cup.layers > layers or cup.dims > dims]
    if not too_big and Size(layers, dims) in ladder:
        assert ladder.check(layers, dims) is ladder
        return
    with pytest.raises(LadderError) as caught:
        ladder.check(layers, dims)
    named = str(too_big[0]) if too_big else f"full size {layers}x{dims} is missing"
    assert named in str(caught.value)


@given(st.integers(1, 100), st.integers(1, 5000))
def test_every_model_has_a_default(layers, dims):
    ladder = Ladder.default(layers, dims).check(layers, dims)
    assert len({cup.layers for cup in ladder}) == len({cup.dims for cup in ladder}) == len(ladder) <= layers
    assert [cup.dims for cup in ladder] == sorted(cup.dims for cup in ladder)
    for cup in ladder.sizes[:-1]:
        assert cup.dims & (cup.dims - 1) == 0  # a power of two
        assert cup.dims >= 32 or dims < 256


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((12, 384), "2x32,5x64,7x128,10x256,12x384"),
        ((6, 384), "1x32,2x64,4x128,5x256,6x384"),
        ((24, 1024), "4x32,8x64,12x128,16x256,20x512,24x1024"),
        ((2, 384), "1x64,2x384"),
        ((1, 768), "1x768"),
        ((4, 32), "1x4,2x8,3x16,4x32"),
    ],
)
def test_defaults(shape, expected):
    assert str(Ladder.default(*shape)) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "a ladder needs at least one size, for instance 2x32,4x64,6x128"),
        (" , ,", "at least one size"),
        ([], "at least one size"),
        ("2x32,huge", "'huge' is no size: write layers x dims, as in 6x128"),
        ("2x32;4x64", "'2x32;4x64' is no size"),
        ("2x32,4x", "'4x' is no size"),
        ("2x-32", "'2x-32' is no size"),
        ("2x3.5", "is no size"),
        ("2x٣", "is no size"),
        ("2x" + "9" * 5000, "is no size"),
        ("0x32", "layers must be an integer from 1 on, got 0"),
        ("2x0", "dims must be an integer from 1 on, got 0"),
        ("2x32,4x64,2x32", "the size 2x32 is in the ladder twice"),
        ("demi,2x32", "'demi' is no size"),
        ([(2, 32, 1)], r"\(2, 32, 1\) is no size: write layers x dims"),
        ([7], "7 is no size"),
        ([(True, 32)], "layers must be an integer from 1 on, got True"),
        ([(2.0, 32)], "layers must be an integer from 1 on, got 2.0"),
        ([(2, None)], "dims must be an integer from 1 on, got None"),
        (7, "7 is no ladder: write it as 2x32,4x64,6x128"),
        (None, "None is no ladder"),
    ],
)
def test_what_is_no_ladder(text, reason):
    with pytest.raises(LadderError, match=reason):
        Ladder.parse(text)


@given(st.text(max_size=20))
def test_any_text_is_a_ladder_or_a_ladder_error(text):
    try:
        assert all(cup.layers > 0 and cup.dims > 0 for cup in Ladder.parse(text))
    except LadderError as error:
        assert str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["cups", "layers", "dims"]), inner),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_a_ladder_or_a_ladder_error(value):
    try:
        assert Ladder.from_json(value)
    except LadderError as error:
        assert str(error)


@pytest.mark.parametrize(
    "value, reason",
    [
        ({"cups": []}, "at least one size"),
        ({"cups": [{"layers": 2}]}, "dims must be an integer from 1 on, got None"),
        ({"cups": "2x32"}, "the ladder is damaged: expected"),
        ({"format": 2, "cups": [{"layers": 2, "dims": 32}]}, "has format 2, this version reads 1: update nestling"),
    ],
)
def test_damaged_json(value, reason):
    with pytest.raises(LadderError, match=reason):
        Ladder.from_json(value)


def test_other_keys_are_left_alone():
    assert str(Ladder.from_json({"cups": [{"layers": 2, "dims": 32, "spearman": 0.7}], "base": "x"})) == "2x32"


def test_a_cup_that_does_not_fit_comes_with_advice():
    with pytest.raises(LadderError, match="8x256 is deeper than the model, which is 6x384: 1x32,.*,6x384 would do"):
        Ladder.parse(PAPER).check(6, 384)
    with pytest.raises(LadderError, match="the full size 12x1024 is missing: it teaches the others; add it to 2x32,"):
        Ladder.parse(PAPER).check(12, 1024)
    with pytest.raises(LadderError, match="the size 3x64 is not in the ladder: choose one of 2x32,"):
        Ladder.parse(PAPER).named("3x64")
