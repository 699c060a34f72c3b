"""Training on tiny encoders: every cup gains, it resumes, two processes are as good as one, bad input is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from nestling import embed
from nestling.embed import GridEvaluator, StarbucksLoss
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import encode
from nestling.embed.model.folder import load_ladder, load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection, fit_projections
from nestling.embed.training.teacher import shared_table
from nestling.errors import LadderError, TrainingError
from nestling.jobs.checkpoints import last_whole

from ..families import FAMILIES, sentence_model, some_texts
from ..ways import loss_of, train

CUPS = "1x8,2x16,4x32"
NAMES = ["1x8", "2x16", "4x32"]
TEXTS = list(dict.fromkeys(some_texts(60, seed=1, longest=8)))
FAST = dict(steps=30, batch_size=8, learning_rate=1e-3, progress=False)


def pairs(count: int = 32, negatives: bool = False) -> list[dict]:
    """A text means the same as its words in the other order."""
    texts = list(dict.fromkeys(some_texts(3 * count, seed=2, longest=8)))
    rows = [{"anchor": text, "positive": " ".join(reversed(text.split()))} for text in texts if " " in text][:count]
    return [row | {"negative": text} for row, text in zip(rows, texts[::-1], strict=False)] if negatives else rows


def scored(count: int = 32) -> list[dict]:
    """The score is the share of common words."""
    first, second = some_texts(count, seed=3, longest=6), some_texts(count, seed=4, longest=6)
    mixed = [f"{a} {b}" if i % 2 else b for i, (a, b) in enumerate(zip(first, second, strict=True))]
    return [
        {"sentence1": a, "sentence2": b, "score": len({*a.split()} & {*b.split()}) / 6}
        for a, b in zip(first, mixed, strict=True)
    ]


def run(model, data, folder, cups=CUPS, **options):
    return train(model, data, cups, folder=folder, **{**FAST, **options})


def same(one, other) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def losses_of(point: dict, name: str) -> float:
    return sum(value for key, value in point.items() if key in (name, f"kl_{name}"))


@pytest.mark.parametrize(
    "data, options",
    [
        (pairs(), {}),
        (pairs(negatives=True), {"weights": {"4x32": 2.0}, "temperature": 0.1}),
        (pairs(), {"mini_batch_size": 3}),
        (scored(), {}),
        (pairs(), {"projection": "centred", "projection_rate": 0}),
        (pairs(), {"projection": "none"}),
    ],
    ids=["pairs", "triplets", "cached", "scored", "pairs-centred", "pairs-as-they-are"],
)
def test_training_lowers_the_loss_of_every_cup(encoder, tmp_path, data, options):
    model = encoder()
    trained = run(model, data, tmp_path / "out", **{"steps": 60, "logging_steps": 10, **options})
    first, *_, last = trained.info["curve"]
    for name in NAMES:
        assert losses_of(last, name) < losses_of(first, name), name
    assert not model.training and last["step"] == 60
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)  # a stock one
    torch.testing.assert_close(loaded.encode(TEXTS[:5]), model.encode(TEXTS[:5]))
    assert load_ladder(tmp_path / "out") == trained.ladder
    assert sorted(load_projections(tmp_path / "out")) == ([] if options.get("projection", "") == "none" else [1, 2])


def test_projections_are_trained_like_the_model(encoder, tmp_path):
    """They start as they would be otherwise, with a rate of their own, and are what exports and measurements use."""
    results = {rate: run(encoder(), pairs(), tmp_path / str(rate), projection="centred", projection_rate=rate)
               for rate in (0, 1e-9, 0.01)}  # fmt: skip
    for depth, still in results[0].projections.items():
        torch.testing.assert_close(results[1e-9].projections[depth].encode, still.encode, rtol=0, atol=1e-6)
        trained = results[0.01].projections[depth]
        assert (trained.encode - still.encode).abs().max() > 0.05 and (trained.mean - still.mean).abs().max() > 0.05
        assert not trained.encode.requires_grad
        torch.testing.assert_close(load_projections(tmp_path / "0.01")[depth].encode, trained.encode)
    assert results[0.01].info["curve"][-1]["loss"] < results[0].info["curve"][-1]["loss"]


def test_projections_are_aligned_with_who_teaches(encoder, tmp_path):
    """The full model, or another one whose embeddings of the same texts are followed."""
    teacher = encoder("roberta")
    prompted = [row[column] for column in ("anchor", "positive") for row in pairs()]
    texts = list(dict.fromkeys(prompted))
    for name, given, target in (("own", None, None), ("other", teacher, torch.tensor(teacher.encode(texts)))):
        model = encoder()
        wanted = fit_projections(model, texts, [1, 2], target=target)
        trained = run(model, pairs(), tmp_path / name, steps=1, teacher=given, projection_rate=0)
        for depth, projection in trained.projections.items():
            torch.testing.assert_close(projection.encode.abs(), wanted[depth].encode.abs(), rtol=1e-3, atol=1e-3)


def test_which_depths_have_projections(encoder, tmp_path):
    """The full model's only if the user gives one, or narrower cups share it."""
    given = {4: Projection(torch.eye(32))}
    for name, cups, projection, depths in (
        ("alone", "4x32", "auto", []),
        ("given", "4x32", given, [4]),
        ("shared", "2x8,4x8,4x32", "auto", [2, 4]),
    ):
        own = {"projections": projection} if isinstance(projection, dict) else {"projection": projection}
        run(encoder(), pairs(), tmp_path / name, cups, steps=1, **own)
        assert list(load_projections(tmp_path / name)) == depths
    assert torch.equal(given[4].encode, torch.eye(32))  # a copy was trained


def test_projections_of_the_best_checkpoint_are_kept(encoder, tmp_path):
    """They are read back with the weights that they were trained with."""
    measure = GridEvaluator(CUPS, sts={"dev": scored()})
    model = encoder()
    trained = run(model, pairs(), tmp_path / "out", evaluator=measure, projection="pca", projection_rate=0.05,
                  learning_rate=0.02, save_steps=6)  # fmt: skip
    curve = {point["step"]: point["mean"] for point in trained.info["curve"] if "mean" in point}
    assert curve[trained.info["best_step"]] == max(curve.values()) > curve[max(curve)]
    again = GridEvaluator(CUPS, sts={"dev": scored()}, projections=trained.projections)
    assert again(model)["mean"] == pytest.approx(trained.info["best"], abs=1e-6)


def test_another_encoder_teaches_pairs(encoder, tmp_path, backbones):
    teacher = sentence_model(backbones("distilbert"))
    trained = run(encoder(), pairs(), tmp_path / "pairs", teacher=teacher, logging_steps=10)
    first, *_, last = trained.info["curve"]
    assert {"kl_1x8", "kl_4x32", "1x8"} <= set(first)
    assert last["kl_4x32"] < first["kl_4x32"] and trained.info["teacher"]
    assert (tmp_path / "pairs-checkpoints" / "teacher.npy").is_file()


def test_dropout(encoder, tmp_path):
    model = encoder()
    seen = []
    drop = model[0].model.embeddings.dropout
    drop.register_forward_hook(lambda module, args, output: seen.append((module.training, module.p)))
    run(model, pairs(), tmp_path / "pairs", steps=2)
    assert (True, 0.1) in seen
    seen.clear()
    run(model, pairs(), tmp_path / "quiet", steps=2, dropout=False)
    assert (True, 0.0) in seen and (True, 0.1) not in seen and drop.p == 0.1


@pytest.mark.parametrize(
    "columns, asked, expected",
    [
        (("query", "passage"), None, {"query": "w50 ", "passage": "w51 ", "negative": "w51 "}),
        (("query", "passage"), {"passage": ""}, {"query": "w50 ", "negative": "w51 "}),
        (("query", "passage"), "w53 ", {"query": "w53 ", "passage": "w53 ", "negative": "w53 "}),
        (("anchor", "positive"), None, {"anchor": "w52 ", "positive": "w52 ", "negative": "w52 "}),
        (("anchor", "positive"), {"anchor": "w53 "}, {"anchor": "w53 ", "positive": "w52 ", "negative": "w52 "}),
    ],
)
def test_queries_and_passages_have_the_models_prompts(encoder, tmp_path, monkeypatch, columns, asked, expected):
    """As of an E5, whose vectors are made for them; other rows do not say which of their texts is a query."""
    model, seen, teacher = encoder(), set(), encoder("distilbert")
    model.prompts = {"query": "w50 ", "passage": "w51 ", "usual": "w52 ", "document": ""}
    model.default_prompt_name = "usual"
    teacher.prompts = {"query": "w60 "}
    rows = [dict(zip((*columns, "negative"), row.values(), strict=True)) for row in pairs(8, negatives=True)]
    preprocess = model.preprocess

    def spied(texts, prompt=None, **options):
        seen.add(prompt or "")
        return preprocess(texts, prompt=prompt, **options)

    monkeypatch.setattr(model, "preprocess", spied)
    options = {
        "steps": 1,
        "projection": "none",
        "save_strategy": "no",
    }  # projections embed what has its prompt already
    trained = run(model, rows, tmp_path / "out", prompts=asked, teacher=teacher, **options)
    assert trained.info["prompts"] == expected
    assert trained.info["teacher_prompts"] == ({"query": "w60 "} if "query" in columns else {})
    assert seen == {expected.get(name, "") for name in (*columns, "negative")}


def test_the_best_checkpoint_by_the_mean_of_cups_is_kept(encoder, tmp_path):
    model, measure = encoder(), GridEvaluator(sts={"dev": scored()})
    trained = run(
        model, pairs(), tmp_path / "out", evaluator=measure, projection="pca", learning_rate=0.02, save_steps=6
    )
    points = {p["step"]: p["mean"] for p in trained.info["curve"] if "mean" in p}
    assert list(points) == [0, 6, 12, 18, 24, 30]
    best = max(points, key=lambda step: points[step])  # the start, where nothing is better
    assert trained.info["best_step"] == best
    measure = GridEvaluator(CUPS, sts={"dev": scored()}, projections=trained.projections)
    assert measure(model)["mean"] == pytest.approx(points[best])
    card = (tmp_path / "out" / "README.md").read_text()
    (row,) = [line.split("|")[2:4] for line in card.splitlines() if line.startswith("| 1x8 |")]
    curve = {p["step"]: p for p in trained.info["curve"]}
    wanted = [round(100 * curve[step]["1x8_mean_sts"], 2) for step in (0, best)]
    assert "| size | STS, mean before | STS, mean after |" in card and list(map(float, row)) == pytest.approx(
        wanted, abs=0.1
    )
    assert GridEvaluator(sts={"dev": scored()}).ladder is None


def test_an_exported_cup_is_trained_on(encoder, tmp_path):
    """It has no pooler, which a checkpoint that is read back has: for the best one, and to go on."""
    export(encoder(), "2x16", tmp_path / "cup")
    options = {"cups": "1x8,2x16", "evaluator": GridEvaluator(sts={"dev": scored()}), "learning_rate": 0.02}
    small = load_encoder(tmp_path / "cup")
    trained = run(small, pairs(), tmp_path / "out", save_steps=6, **options)
    points = {p["step"]: p["mean"] for p in trained.info["curve"] if "mean" in p}
    assert trained.info["best_step"] != 30, "choose another learning rate: the best is the last"
    measure = GridEvaluator("1x8,2x16", sts={"dev": scored()}, projections=trained.projections)
    assert measure(small)["mean"] == pytest.approx(points[trained.info["best_step"]])
    again = load_encoder(tmp_path / "cup")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-30")
    run(again, pairs(), tmp_path / "out", save_steps=6, resume=True, **options)
    same(small, again)


def test_losses_of_the_users_own(encoder, tmp_path):
    model = encoder()
    base = losses.CosineSimilarityLoss(model)
    assert run(model, scored(), tmp_path / "base", loss=base, steps=3).info["loss"] == "CosineSimilarityLoss"
    assert run(model, scored(), tmp_path / "made", loss=losses.AnglELoss, steps=3).info["loss"] == "AnglELoss"
    turns = {2: Projection(torch.eye(32).flip(0))}
    whole = loss_of(model, losses.CoSENTLoss(model), "2x16,4x32", kl_weight=0, projections=turns)
    dev = GridEvaluator(sts={"dev": scored()})  # depths without a projection are measured as they are
    trained = run(model, scored(), tmp_path / "whole", cups=None, loss=whole, evaluator=dev)
    assert str(trained.ladder) == "2x16,4x32" and "kl_2x16" not in trained.info["curve"][0]
    torch.testing.assert_close(load_projections(tmp_path / "whole")[2].encode, turns[2].encode)


def test_gradient_checkpointing_and_bf16_change_little(encoder, tmp_path):
    plain, saving = encoder(), encoder()
    layer, seen = saving[0].model.encoder.layer[0].attention, []
    layer.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    run(plain, pairs(), tmp_path / "plain", steps=5, use_cpu=True)
    run(saving, pairs(), tmp_path / "saving", steps=5, use_cpu=True, gradient_checkpointing=True)
    same(plain, saving)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in Encoder.of(saving).backbone.modules())
    once = len(seen)
    seen.clear()
    run(saving, pairs(), tmp_path / "again", steps=5, use_cpu=True)
    assert once > len(seen)  # layers were computed again in the backward pass
    half = encoder()
    trained = run(half, pairs(), tmp_path / "half", steps=5, bf16=True)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    with pytest.raises(AssertionError):
        same(plain, half)
    torch.testing.assert_close(half.encode(TEXTS), plain.encode(TEXTS), rtol=0, atol=0.3)
    assert trained.info["bf16"] is True and trained.info["arguments"] == {}


def test_what_is_written_names_no_folders(encoder, tmp_path):
    run(encoder(), pairs(), tmp_path / "out", steps=2)
    written = [p.read_text("utf-8") for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".md")]
    assert written and not any(str(tmp_path.parent) in text for text in written)  # where the model was read, too
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    info = json.loads((tmp_path / "out" / "nestling.json").read_text())
    assert info["training"]["kind"] == "pairs" and info["training"]["steps"] == 2


@pytest.mark.parametrize(
    "cups, projection, rate, whole",
    [
        (CUPS, "none", 0, True),
        (CUPS, "centred", 1e-3, True),  # the full model's depth has none
        ("1x8,4x16,4x32", "pca", 0, True),  # it keeps similarities
        ("1x8,4x16,4x32", "pca", 1e-3, False),
        ("1x8,4x16,4x32", "centred", 0, False),
    ],
)
def test_the_card_says_how_cups_are_exported(encoder, tmp_path, monkeypatch, cups, projection, rate, whole):
    """Its code is run: it gives the vectors that the cup had in training."""
    model = encoder()
    trained = run(model, pairs(), tmp_path / "out", cups, steps=2, projection=projection, projection_rate=rate)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("the full size 4x32 has to be exported too" in card) != whole
    assert ("it is the full model" in card) == whole
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("this folder", "out"), {})
    given = {1: trained.projections[1].cpu()} if projection != "none" else None
    wanted = torch.nn.functional.normalize(encode(model, TEXTS[:4], {1: 8}, projections=given)[1], dim=-1)
    found = SentenceTransformer(str(tmp_path / "small"), device="cpu").encode(TEXTS[:4])
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5)
    assert load_ladder("small") == Ladder.parse("1x8")


def test_before_is_what_was_measured_before(encoder, tmp_path):
    measure = GridEvaluator(sts={"dev": scored()}, name="dev")
    run(encoder(), pairs(), tmp_path / "out", steps=4, save_steps=2, evaluator=measure, eval_on_start=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "STS, mean after" in card and "before" not in card


def test_exports_of_a_trained_folder_are_its_cups(encoder, tmp_path):
    model = encoder()
    trained = run(model, pairs(), tmp_path / "out", projection="centred")
    folder = tmp_path / "out"
    turns = load_projections(folder)
    export(load_encoder(folder), "2x16", tmp_path / "cup", ladder=load_ladder(folder), projections=turns)
    small = SentenceTransformer(str(tmp_path / "cup"), device="cpu")
    wanted = encode(model, TEXTS[:4], {2: 16}, projections={2: trained.projections[2].cpu()})[2]
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(torch.tensor(small.encode(TEXTS[:4])), wanted, rtol=0, atol=1e-5)
    assert str(load_ladder(tmp_path / "cup")) == "2x16"


def test_a_stopped_training_goes_on_to_the_same_result(encoder, tmp_path, monkeypatch):
    options = {
        "save_steps": 3,
        "steps": 12,
        "projection": "centred",
        "evaluator": GridEvaluator(sts={"dev": scored()}),
        "projection_rate": 0.01,
    }
    data = pairs()
    whole, part = encoder(), encoder()
    expected = run(whole, data, tmp_path / "whole", **options)
    forward, calls = StarbucksLoss.forward, []

    def failing(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 8:
            raise RuntimeError("the power went")
        return forward(self, *args)

    monkeypatch.setattr(StarbucksLoss, "forward", failing)
    with pytest.raises(TrainingError, match="step 8: the power went; checkpoint-6 is kept in"):
        run(part, data, tmp_path / "part", **options)
    monkeypatch.undo()
    assert not (tmp_path / "part").exists()
    part = encoder()
    found = run(part, data, tmp_path / "part", resume=True, **options)
    same(whole, part)
    for depth, projection in expected.projections.items():
        same(projection, found.projections[depth])
    assert found.info["curve"] == expected.info["curve"] and found.info["best"] == expected.info["best"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_to_the_same_result(encoder, tmp_path, monkeypatch, family):
    options = {"cups": "2x16,4x32", "steps": 2, "save_steps": 1}
    whole, part = encoder(family), encoder(family)
    run(whole, pairs(), tmp_path / "whole", **options)
    forward, calls = StarbucksLoss.forward, []

    def failing(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            raise RuntimeError("the power went")
        return forward(self, *args)

    monkeypatch.setattr(StarbucksLoss, "forward", failing)
    with pytest.raises(TrainingError, match="step 2: the power went; checkpoint-1 is kept in"):
        run(part, pairs(), tmp_path / "part", **options)
    monkeypatch.undo()
    part = encoder(family)
    run(part, pairs(), tmp_path / "part", resume=True, **options)
    same(whole, part)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.embed.families import sentence_model
from tests.embed.training.test_train import pairs, run
torch.set_num_threads(1)
torch.manual_seed(0)
run(sentence_model({backbone!r}), pairs(), sys.argv[1], steps={steps}, use_cpu=True, save_steps=1,
    projection="centred", projection_rate=1e-3, dropout={dropout}, resume=len(sys.argv) > 2, adam_epsilon=1e-4)
"""


@pytest.fixture
def script(tmp_path, backbones):
    """A training as a process: ``script(steps, dropout)(folder, *arguments, launcher=[...])``."""
    root = str(Path(__file__).parents[3])

    def make(steps: int, dropout: bool):
        path = tmp_path / f"train{steps}.py"
        path.write_text(SCRIPT.format(root=root, backbone=str(backbones("bert")), steps=steps, dropout=dropout))
        environment = {**os.environ, "PYTHONPATH": f"{root}/src", "OMP_NUM_THREADS": "1"}

        def start(*arguments, launcher=()):
            command = [sys.executable, *launcher, str(path), *map(str, arguments)]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

        return start

    return make


def weights(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_result(tmp_path, script):
    process = script(40, True)
    part = process(tmp_path / "part")
    held = tmp_path / "part-checkpoints"
    for _ in iter(lambda: part.poll() is None and not list(held.glob("checkpoint-1?")), False):
        pass  # wait for a checkpoint somewhere in the middle
    assert part.poll() is None
    part.send_signal(signal.SIGKILL)
    part.wait()
    assert not (tmp_path / "part").exists()
    for finished in (process(tmp_path / "part", "resume"), process(tmp_path / "whole")):
        output = finished.communicate()[0].decode()
        assert finished.returncode == 0, output
    same(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    turns = [load_projections(tmp_path / name) for name in ("whole", "part")]
    assert all(torch.equal(turn.encode, turns[1][depth].encode) for depth, turn in turns[0].items())


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path, script):
    """The batch, its negatives and its similarity rows are the global ones."""
    process = script(5, False)
    two = process(tmp_path / "two", launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    one = process(tmp_path / "one")
    for finished in (one, two):
        output = finished.communicate()[0].decode()
        assert finished.returncode == 0, output
        assert "find_unused_parameters" not in output  # DDP looks for them only where there are some
    turns = [load_projections(tmp_path / name) for name in ("one", "two")]
    for depth, turn in turns[0].items():
        assert (turn.encode.T @ turn.encode - torch.eye(32)).abs().max() > 1e-4  # it was trained
        torch.testing.assert_close(turn.encode, turns[1][depth].encode, rtol=1e-3, atol=1e-3)
    for point, other in zip(*(json.loads((tmp_path / n / "nestling.json").read_text())["training"]["curve"]
                              for n in ("one", "two")), strict=True):  # fmt: skip
        assert point == pytest.approx(other, rel=1e-3, abs=2e-4)


def test_processes_share_the_work_of_a_teacher(encoder, tmp_path):
    """Each embeds every n-th text; the table is the one that a single process writes, and nothing else is left."""
    texts = [(prompt, text) for text in TEXTS[:9] for prompt in ("", "w50 ")]
    for name, processes in (("one", 1), ("three", 3), ("many", 30)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "teacher.npy"
        run = [Thread(target=shared_table, args=(path, encoder(), texts, i, processes)) for i in range(processes)]
        [thread.start() for thread in run[::-1]]
        [thread.join() for thread in run]
        assert [p.name for p in path.parent.iterdir()] == ["teacher.npy"]
        wanted = [encoder().encode(text, prompt=prompt) for prompt, text in texts]
        torch.testing.assert_close(torch.tensor(np.load(path)), torch.tensor(np.array(wanted)), rtol=1e-4, atol=1e-5)


def test_a_stale_teacher_is_not_followed(encoder, tmp_path):
    """A training that was stopped before its first checkpoint may have followed other texts."""
    held = tmp_path / "out-checkpoints"
    held.mkdir()
    for name in ("teacher.npy", "teacher-0-of-2.npy"):
        np.save(held / name, np.ones((2 * len(pairs()), 3), np.float32))
    run(encoder(), pairs(), tmp_path / "out", steps=1, teacher=encoder("distilbert"))
    assert [p.name for p in held.glob("teacher*")] == ["teacher.npy"] and np.load(held / "teacher.npy").shape[1] == 32


def test_a_loss_that_is_not_finite_stops_the_training(encoder, tmp_path, monkeypatch):
    forward, calls = StarbucksLoss.forward, []

    def poisoned(self, *args):
        calls.append(torch.is_grad_enabled())
        found = forward(self, *args)
        return {**found, "kl_1x8": found["kl_1x8"] * torch.nan} if sum(calls) == 5 else found

    monkeypatch.setattr(StarbucksLoss, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 5: the loss is not finite \(kl_1x8\); checkpoint-4 is kept in"):
        run(encoder(), pairs(), tmp_path / "out", save_steps=2)
    kept = weights(last_whole(tmp_path / "out-checkpoints"))
    assert all(p.isfinite().all() for p in kept.parameters())


def test_a_gradient_that_is_not_finite_stops_the_training(encoder, tmp_path):
    model = encoder()
    model[0].model.encoder.layer[1].output.dense.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite \(.*there is no checkpoint"):
        run(model, pairs(), tmp_path / "out")


def test_broken_weights_are_found_before_anything_is_written(encoder, tmp_path):
    model = encoder()
    model[0].model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="before the first step the loss is not finite .*2x16.*broken"):
        run(model, pairs(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_are_checked(encoder, tmp_path):
    with pytest.raises(TrainingError, match="no training to resume: training.json is missing"):
        run(encoder(), pairs(), tmp_path / "out", resume=True)
    run(encoder(), pairs(), tmp_path / "out", steps=4)
    with pytest.raises(TrainingError, match="out exists: choose another folder, or remove it"):
        run(encoder(), pairs(), tmp_path / "out", steps=4)
    with pytest.raises(TrainingError, match=r"holds another training \(.*learning_rate: 0.001, now 0.01"):
        run(encoder(), pairs(), tmp_path / "out", steps=4, resume=True, learning_rate=0.01)
    with pytest.raises(TrainingError, match=r"holds another training \(.*kind: pairs, now scored"):
        run(encoder(), scored(), tmp_path / "out", steps=4, resume=True)
    short, model = encoder(), encoder()
    short.max_seq_length = 5
    for other, options, changed in (
        (short, {}, "max_seq_length: 64, now 5"),
        (encoder(pooling="cls"), {}, "pooling: .*mean.*, now .*cls"),
        (encoder(), {"weight_decay": 0.1}, "arguments: {}, now {'weight_decay': '0.1'}"),
        (encoder(), {"mini_batch_size": 2}, "loss_settings: "),
        (model, {"loss": losses.MultipleNegativesRankingLoss(model, scale=3.0)}, "loss_settings: .*20.0.*now .*3.0"),
        (encoder(), {"teacher": encoder(), "teacher_prompts": "w9 "}, "teacher_prompts: {}, now {'anchor': 'w9 '"),
    ):
        with pytest.raises(TrainingError, match=rf"holds another training \(.*{changed}"):
            run(other, pairs(), tmp_path / "out", resume=True, **{"steps": 4, **options})
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(TrainingError, match="holds checkpoints already"):
        run(encoder(), pairs(), tmp_path / "out", steps=4)
    again = encoder()
    run(again, pairs(), tmp_path / "out", steps=4, resume=True, logging_steps=2)  # which changes no weight
    same(again, weights(tmp_path / "moved"))


@pytest.mark.parametrize(
    "data, options, error, message",
    [
        (pairs(), {"cups": "1x8,5x32"}, LadderError, "5x32 is deeper than the model"),
        (pairs(), {"cups": "1x64,4x32"}, LadderError, "1x64 is wider than the model"),
        (pairs(), {"cups": "1x8,2x16"}, LadderError, "the full size 4x32 is missing"),
        (pairs(), {"cups": "1x8,1x8,4x32"}, LadderError, "twice"),
        ([{"anchor": "w9", "positive": " "}], {}, embed.ExampleError, "row 1: 'positive' is blank"),
        (["w9", "w9"], {}, embed.ExampleError, "all texts are the same"),
        (pairs(), {"batch_size": 33}, ValueError, "batch_size=33 does not fit 32 rows"),
        (pairs(), {"batch_size": 1}, ValueError, "a loss compares at least two"),
        (pairs(), {"batch_size": 4, "gradient_accumulation_steps": 4}, ValueError, "a loss compares at least two"),
        (pairs(1), {"batch_size": None}, ValueError, "batch_size=1 does not fit 1 rows"),
        (pairs(), {"batch_size": 9, "gradient_accumulation_steps": 2}, ValueError, "must be a multiple of"),
        (pairs(), {"steps": 0}, ValueError, "steps=0"),
        (pairs(), {"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        (pairs(), {"warmup": 1.5}, ValueError, "warmup=1.5"),
        (pairs(), {"projection": "spin"}, ValueError, "projection='spin' is unknown: expected one of auto, aligned"),
        (pairs(), {"projection": "pca", "projection_rate": -1.0}, ValueError, "projection_rate=-1.0"),
        (pairs(), {"klweight": 1}, ValueError, "no option klweight"),
        (pairs(), {"kl_weight": "words"}, ValueError, "kl_weight='words'"),
        (pairs(), {"loss": losses.EmbedDistillLoss}, ValueError, "EmbedDistillLoss compares coordinates"),
        (pairs(), {"max_steps": 9}, ValueError, "max_steps=9 is no option of this training: use steps"),
        (pairs(), {"per_device_train_batch_size": 9}, ValueError, "use batch_size"),
        (pairs(), {"num_train_epochs": 2}, ValueError, "use epochs"),
        (pairs(), {"warmup_ratio": 0.2}, ValueError, "use warmup, a share"),
        (pairs(), {"torch_compile": True}, ValueError, "torch_compile=True .*the model stays uncompiled"),
        (pairs(), {"stepz": 9}, ValueError, "no option stepz"),
        (pairs(), {"teacher_prompts": "w9 "}, ValueError, "teacher_prompts='w9 ' without a teacher"),
        (pairs(), {"prompts": {"query": "w9"}}, ValueError, r"no columns \['query'\] to prompt: expected anchor"),
        (scored(), {"mini_batch_size": 4}, ValueError, "mini_batch_size=4 is for pairs"),
        (pairs(), {"loss": losses.CoSENTLoss}, ValueError, "CoSENTLoss needs labels and there are none"),
        (
            scored(),
            {"loss": losses.MultipleNegativesRankingLoss},
            ValueError,
            "reads no labels, and these rows have some, such as 0.0: use CoSENTLoss",
        ),
        (
            [r | {"label": [1.0, 2.0]} for r in pairs()],
            {"loss": losses.CoSENTLoss},
            ValueError,
            "CoSENTLoss",
        ),
        ([r | {"label": "good"} for r in pairs()], {"loss": losses.CoSENTLoss}, ValueError, "must be a finite number"),
        (pairs(), {"loss": losses.CachedGISTEmbedLoss}, ValueError, "guide"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(encoder, tmp_path, data, options, error, message):
    with pytest.raises(error, match=message):
        run(encoder(), data, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_losses_that_do_not_fit_are_refused(encoder, tmp_path):
    model, teacher = encoder(), encoder()
    with pytest.raises(ValueError, match="CoSENTLoss is of another model"):
        run(model, scored(), tmp_path / "out", loss=losses.CoSENTLoss(teacher))
    with pytest.raises(ValueError, match="a teacher takes the place of labels"):
        run(model, scored(), tmp_path / "out", teacher=teacher)
    whole = StarbucksLoss(model, losses.MultipleNegativesRankingLoss(model), CUPS)
    with pytest.raises(ValueError, match="MultipleNegativesRankingLoss takes every row as a good one"):
        run(model, scored(), tmp_path / "out", cups=None, loss=whole)
    whole = StarbucksLoss(model, losses.CoSENTLoss(model), CUPS)
    with pytest.raises(ValueError, match="a StarbucksLoss has its own teacher"):
        run(model, scored(), tmp_path / "out", cups=None, loss=whole, teacher=teacher)
    with pytest.raises(ValueError, match="a StarbucksLoss has its own sizes, 1x8,2x16,4x32"):
        run(model, scored(), tmp_path / "out", cups="1x8,4x32", loss=whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, columns, labels, message",
    [
        ("TripletLoss", 3, lambda i: 1.0, "TripletLoss takes every row as a good one and reads no labels"),
        ("ContrastiveLoss", 2, lambda i: i % 2, None),
        ("BatchAllTripletLoss", 1, lambda i: i % 3, None),
        ("MarginMSELoss", 3, lambda i: i - 3.5, None),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_labels_that_a_loss_does_not_read_are_refused(encoder, tmp_path, name, columns, labels, message, wrapped):
    model, texts = encoder(), list(dict.fromkeys(some_texts(90, seed=7)))[:72]
    base = getattr(losses, name)(model)
    loss = StarbucksLoss(model, base, "2x16,4x32") if wrapped else base
    rows = [{f"text{n}": texts[24 * n + i] for n in range(columns)} | {"label": labels(i)} for i in range(24)]
    options = {"loss": loss, "cups": None if wrapped else "2x16,4x32", "steps": 1}
    if message is None:
        assert run(model, rows, tmp_path / "out", **options).info["kind"] == "rows"
        return
    with pytest.raises(ValueError, match=message):
        run(model, rows, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_dot_products_are_warned_of(encoder, tmp_path):
    model = encoder()
    whole = loss_of(model, losses.MultipleNegativesRankingLoss(model), CUPS, normalize=False)
    for name, options in (("config", {"normalize": False}), ("whole", {"loss": whole, "cups": None})):
        with pytest.warns(UserWarning, match="normalize=False trains for dot products, and exports give unit vectors"):
            run(model, pairs(), tmp_path / name, steps=1, **options)


def test_missing_packages_are_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["nestling.embed.training.train"], "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"training needs accelerate: pip install 'nestling\[train,embed\]'"):
        run(encoder(), pairs(), tmp_path / "out")
