"""Sizes, numbers, switches and names of the encoder wing: refused with a typed error where they cannot be."""

import math

import pytest
import torch

from nestling import embed
from nestling.embed.evaluation.agreement import agreement
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import encode
from nestling.embed.model.projection import fit_projections
from nestling.embed.model.taps import taps
from nestling.errors import EvaluationError, LadderError, NestlingError, OptionError

from .families import some_texts
from .training.test_train import CUPS, TEXTS, scored
from .ways import align, loss_of

WRONG_SIZES = (0, -1, -3, 2.5, math.nan, math.inf, "8", None, True, [8], 1 + 0j)
WRONG_SWITCHES = (1, 0, "yes", None, [])
STS = {"dev": scored()}


@pytest.mark.parametrize("value", WRONG_SIZES, ids=repr)
def test_batches_of_no_size(encoder, tmp_path, value):
    """They encoded nothing, and returned what was in the memory."""
    model = encoder()
    for call in (
        lambda: align(model, TEXTS, CUPS, folder=tmp_path / "out", batch_size=value, progress=False),
        lambda: embed.GridEvaluator(sts=STS, batch_size=value),
        lambda: agreement(model, TEXTS, CUPS, batch_size=value),
        lambda: agreement(model, TEXTS, CUPS, torch.ones(len(TEXTS), 32), batch_size=value),
        lambda: fit_projections(model, TEXTS, [1], batch_size=value),
        lambda: encode(model, TEXTS, {1: 8}, batch_size=value),
        lambda: embed.PretrainConfig(batch_size=value),
    ):
        with pytest.raises(OptionError, match="batch_size"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_changed_later_is_looked_at_too(encoder):
    evaluator = embed.GridEvaluator("1x8", sts=STS)
    evaluator.batch_size = -3
    with pytest.raises(OptionError, match="batch_size=-3"):
        evaluator.rows(encoder())


@pytest.mark.parametrize("value", WRONG_SWITCHES, ids=repr)
def test_switches(encoder, tmp_path, value):
    model = encoder()
    for name, call in {
        "progress": lambda: embed.GridEvaluator(sts=STS, progress=value),
        "onnx": lambda: export(model, "1x8", tmp_path / "out", onnx=value),
        "int8": lambda: export(model, "1x8", tmp_path / "out", int8=value),
        "skip_bad": lambda: embed.Texts(["x.txt"], skip_bad=value),
        "normalize": lambda: loss_of(model, None, CUPS, teacher=torch.ones(2, 3), normalize=value),
        "gather": lambda: embed.StarbucksLoss(
            model, None, CUPS, teacher=torch.ones(2, 3), gather_across_devices=value
        ),
    }.items():
        with pytest.raises(OptionError, match=name):
            call()
    with pytest.raises(OptionError, match="progress"):
        align(model, TEXTS, CUPS, folder=tmp_path / "out", progress=value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, 5, "", b"out", [], True], ids=repr)
def test_folders(encoder, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    model = encoder()
    for call in (
        lambda: align(model, TEXTS, CUPS, folder=value, progress=False),
        lambda: export(model, "1x8", value),
    ):
        with pytest.raises(OptionError, match="folder"):
            call()
    assert not list(tmp_path.iterdir())


NO_LADDERS = [5, None, "", "x", "1x", "0x8", "1x-8", "1.5x8", b"1x8", [1], [(1,)], [(0, 8)], [None], [(1, 8.5)],
              [(True, 8)], [("1", "8")], ["1x8", 5], [(math.nan, 8)], "9x8", "1x999"]  # fmt: skip


@pytest.mark.parametrize("cups", NO_LADDERS, ids=repr)
def test_ladders(encoder, tmp_path, cups):
    model = encoder()
    if cups is not None:  # the model's own
        with pytest.raises(LadderError):
            align(model, TEXTS, cups, folder=tmp_path / "out", progress=False)
    if cups not in ("9x8", "1x999"):
        with pytest.raises(LadderError):
            Ladder.parse(cups)
    with pytest.raises(LadderError):
        export(model, cups[-1] if isinstance(cups, list) else cups, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, 5, 1.5, b"1x8", (1, 8, 2), [], math.nan], ids=repr)
def test_cups_by_name(value):
    with pytest.raises(LadderError):
        Size.parse(value)


@pytest.mark.parametrize(
    "layers", [[], [0], [-1], [5], [1.5], ["1"], [None], [True], [math.nan], "12", [2**70]], ids=repr
)
def test_depths(encoder, layers):
    model = encoder()
    features = model.preprocess(TEXTS[:2])
    with pytest.raises(LadderError):
        taps(model, features, layers)
    assert list(taps(model, features, iter([2, 1]))) == [1, 2]


@pytest.mark.parametrize("texts", ["one string of texts", 5, None, [1, 2], [None] * 20, [b"x"] * 20], ids=repr)
def test_texts_that_are_none(encoder, tmp_path, texts):
    """A string is a list of its letters, to Python."""
    model = encoder()
    for call in (
        lambda: align(model, texts, CUPS, folder=tmp_path / "out", progress=False),
        lambda: agreement(model, texts, CUPS),
        lambda: fit_projections(model, texts, [1]),
    ):
        with pytest.raises(NestlingError):
            call()
    assert not list(tmp_path.iterdir())


def test_one_string_is_no_list_of_texts(encoder):
    with pytest.raises(EvaluationError, match="some words"):
        encode(encoder(), "some words", {1: 8})
    with pytest.raises(EvaluationError, match="2"):
        fit_projections(encoder(), ["some words", 5], [1])


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": "query: "}, {"prompts": {"query": 5}}, {"prompts": {"nobody": "x"}}, {"sts": "file"}, {"sts": 5},
        {"retrieval": ["x"]}, {"projections": [1]}, {"name": None}, {"name": 5}, {},
    ],
    ids=str,
)  # fmt: skip
def test_evaluators(options):
    with pytest.raises(NestlingError):
        embed.GridEvaluator(CUPS, **({"sts": STS} | options if options else {}))


def test_references_of_other_texts(encoder):
    model = encoder()
    for shape in ((3, 32), (len(TEXTS),)):
        with pytest.raises(EvaluationError, match="reference"):
            agreement(model, TEXTS, CUPS, torch.ones(shape))


def test_prompts_are_strings(encoder, tmp_path):
    for value in (5, ["x"], b"x"):
        with pytest.raises(OptionError, match="prompt"):
            align(encoder(), TEXTS, CUPS, folder=tmp_path / "out", prompt=value, progress=False)
        with pytest.raises(OptionError, match="prompt"):
            encode(encoder(), TEXTS, {1: 8}, prompt=value)


def test_what_fits_is_still_taken(encoder):
    """Cups in any form and order, sizes of other libraries' types."""
    model, texts = encoder(), some_texts(20, seed=9)
    rows = agreement(model, texts, [(2, 16), "1x8"], batch_size=torch.tensor(4))
    assert [row["size"] for row in rows] == ["2x16", "1x8"]
    assert agreement(model, texts, "1x8,2x16")[1] == agreement(model, texts, [Size(2, 16)])[0]
