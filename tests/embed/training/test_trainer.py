"""The stock trainer's own words: evaluators, losses, intervals, callbacks and interrupts, as its users know them."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import evaluation, losses
from transformers import EarlyStoppingCallback, IntervalStrategy, TrainerCallback
from transformers.trainer_callback import ExportableState

from nestling.embed import GridEvaluator
from nestling.embed.pretraining.pretrain import pretrain
from nestling.errors import TrainingError

from ..families import some_texts
from ..pretraining.test_pretrain import config as pretrain_config
from ..ways import train
from .test_train import CUPS, TEXTS, pairs, same, scored

FAST = dict(steps=8, batch_size=8, learning_rate=1e-3, progress=False)
STS = scored()


def run(model, folder, data=None, **options):
    return train(model, pairs() if data is None else data, CUPS, folder=folder, **{**FAST, **options})


def stock(name: str = "dev", **options) -> evaluation.EmbeddingSimilarityEvaluator:
    columns = [[row[key] for row in STS] for key in ("sentence1", "sentence2", "score")]
    return evaluation.EmbeddingSimilarityEvaluator(*columns, name=name, **options)


def retrieval(name: str = "ir") -> evaluation.InformationRetrievalEvaluator:
    texts = list(dict.fromkeys(some_texts(30, seed=5)))
    queries = {f"q{i}": " ".join(reversed(text.split())) for i, text in enumerate(texts[:8])}
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    return evaluation.InformationRetrievalEvaluator(queries, corpus, {f"q{i}": {f"d{i}"} for i in range(8)}, name=name)


class Counting(evaluation.SentenceEvaluator):
    """Measures how often it was asked, so that the best is known; falls after ``top`` times."""

    def __init__(self, top: int = 99, better: bool = True):
        super().__init__()
        self.calls, self.steps, self.top, self.greater_is_better = 0, [], top, better

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        self.calls, self.steps = self.calls + 1, [*self.steps, steps]
        self.primary_metric = "height"
        return {"other": -1.0, "height": float(self.calls if self.calls <= self.top else -self.calls)}


# evaluators


@pytest.mark.parametrize(
    "make, metric",
    [
        (stock, "dev_spearman_cosine"),
        (retrieval, "ir_cosine_ndcg@10"),
        (lambda: [stock()], "dev_spearman_cosine"),
        (lambda: (stock("a"), retrieval("b")), "sequential_score"),
        (lambda: evaluation.SequentialEvaluator([retrieval(), stock()]), "sequential_score"),
        (lambda: [stock(), GridEvaluator(sts={"dev": STS}, name="grid")], "sequential_score"),
        (lambda: GridEvaluator(sts={"dev": STS}, name="grid"), "grid_mean"),
        (lambda: Counting(), "height"),
    ],
    ids=["similarity", "retrieval", "list of one", "several", "sequential", "with a grid", "grid", "own"],
)
def test_evaluators_measure_and_choose(encoder, tmp_path, make, metric):
    model = encoder()
    trained = run(model, tmp_path / "out", evaluator=make(), eval_steps=2)
    best = trained.info["best_step"]
    if best == 0:  # no checkpoint is better than the start, which is what is left
        same(model, encoder())
        best = 8
    state = json.loads((tmp_path / "out-checkpoints" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    values = {entry["step"]: entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry}
    assert trained.info["best"] == max(values.values()) == values[trained.info["best_step"]]
    assert set(values) == set(range(0, best + 1, 2))
    if trained.info["best_step"] == 0:
        return
    kept = SentenceTransformer(str(tmp_path / "out-checkpoints" / f"checkpoint-{best}"), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS[:4]), kept.encode(TEXTS[:4]))


def test_a_stock_evaluator_measures_the_full_model_itself(encoder, tmp_path):
    model = encoder()
    before = stock()(model)["dev_spearman_cosine"]
    trained = run(model, tmp_path / "out", evaluator=stock(), eval_steps=4)
    points = {
        p["step"]: p["eval_dev_spearman_cosine"] for p in trained.info["curve"] if "eval_dev_spearman_cosine" in p
    }
    assert points[0] == pytest.approx(before, abs=1e-6) and sorted(points) == [0, 4, 8]
    assert stock()(model)["dev_spearman_cosine"] == pytest.approx(trained.info["best"], abs=1e-5)


def test_an_evaluator_is_asked_once_at_each_point(encoder, tmp_path):
    counting = Counting()
    run(encoder(), tmp_path / "out", evaluator=counting, eval_steps=2)
    assert counting.steps == [-1, 2, 4, 6, 8]  # the first one before anything is written


@pytest.mark.parametrize("better, expected", [(True, 6), (False, 8)])
def test_which_way_is_better(encoder, tmp_path, better, expected):
    evaluator = Counting(top=4, better=better)  # 1 before, 2, 3, 4 at steps 2, 4, 6, then -5
    trained = run(encoder(), tmp_path / "out", evaluator=evaluator, eval_steps=2)
    assert trained.info["best_step"] == expected


def test_a_metric_by_name(encoder, tmp_path):
    names = ("2x16_mean_sts", "eval_mean_sts", "1x8_mean_sts")
    for i, name in enumerate(names):
        evaluator = GridEvaluator(sts={"dev": STS})
        trained = run(encoder(), tmp_path / f"{i}", evaluator=evaluator, eval_steps=2, metric_for_best_model=name)
        points = {p["step"]: p for p in trained.info["curve"] if "mean" in p}
        column = name.removeprefix("eval_")
        assert trained.info["best"] == max(point[column] for point in points.values())


# intervals


@pytest.mark.parametrize(
    "options, saved, measured",
    [
        ({"eval_steps": 4}, [4, 8], [0, 4, 8]),
        ({"save_steps": 4}, [4, 8], [0, 4, 8]),
        ({"eval_steps": 3}, [3, 6, 8], [0, 3, 6, 8]),
        ({"eval_steps": 2, "save_steps": 4}, [4, 8], [0, 2, 4, 6, 8]),
        ({"eval_steps": 0.5}, [4, 8], [0, 4, 8]),
        ({"save_strategy": "epoch"}, [4, 8], [0, 4, 8]),  # 32 rows in batches of 8
        ({"eval_strategy": "epoch"}, [4, 8], [0, 4, 8]),
        ({"save_strategy": IntervalStrategy.EPOCH, "eval_strategy": "epoch"}, [4, 8], [0, 4, 8]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8], [0, 4, 8]),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8], [0, 4, 8]),
        ({"eval_strategy": "no", "save_steps": 4}, [4, 8], []),
        ({"save_strategy": "no", "eval_steps": 4}, [], [0, 4, 8]),
        ({"eval_steps": 3, "save_steps": 4, "load_best_model_at_end": False}, [4, 8], [0, 3, 6, 8]),
        ({"eval_on_start": False, "eval_steps": 4}, [4, 8], [4, 8]),
        ({"save_steps": None, "eval_steps": 4}, [4, 8], [0, 4, 8]),
        ({"logging_strategy": "epoch", "eval_steps": 4}, [4, 8], [0, 4, 8]),
    ],
    ids=str,
)
def test_intervals_follow_each_other(encoder, tmp_path, options, saved, measured):
    evaluator = GridEvaluator(sts={"dev": STS})
    trained = run(encoder(), tmp_path / "out", evaluator=evaluator, save_total_limit=9, **options)
    found = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out-checkpoints").glob("checkpoint-*"))
    assert found == saved
    assert [point["step"] for point in trained.info["curve"] if "mean" in point] == measured
    keeps = measured and saved and options.get("load_best_model_at_end") is not False
    assert ("best_step" in trained.info) == bool(keeps)


def test_only_the_best_is_saved(encoder, tmp_path):
    trained = run(encoder(), tmp_path / "out", evaluator=Counting(top=3), eval_steps=2, save_strategy="best")
    kept = {path.name for path in (tmp_path / "out-checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4"}  # better than what was before, each
    assert trained.info["best_step"] == 4


# losses


@pytest.mark.parametrize(
    "loss",
    [
        "MultipleNegativesRankingLoss",
        losses.MultipleNegativesRankingLoss,
        {"pairs": losses.MultipleNegativesRankingLoss},
        {"pairs": "MultipleNegativesRankingLoss"},
        lambda model: losses.MultipleNegativesRankingLoss(model),
    ],
    ids=["name", "class", "dict", "dict of a name", "function"],
)
def test_losses_in_any_form_are_the_same_loss(encoder, tmp_path, loss):
    one, other = encoder(), encoder()
    run(one, tmp_path / "one", loss=loss)
    run(other, tmp_path / "other", loss=losses.MultipleNegativesRankingLoss(other))
    same(one, other)


# callbacks


class StopAt(TrainerCallback):
    def __init__(self, step: int = 5):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Interrupt(TrainerCallback):
    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt):
        self.step, self.error = step, error

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_pre_optimizer_step(args, state, control)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise self.error("by hand")


class Seen(TrainerCallback, ExportableState):
    """Counts steps, and says so in checkpoints."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_callbacks_as_objects_and_classes(encoder, tmp_path):
    seen = Seen()
    trained = run(encoder(), tmp_path / "out", callbacks=[seen, StopAt])
    assert seen.steps == 5 and trained.info["stopped_at"] == 5
    alone = run(encoder(), tmp_path / "alone", callbacks=StopAt(3))
    assert alone.info["stopped_at"] == 3
    assert "stopped_at" not in run(encoder(), tmp_path / "all").info


def test_what_a_callback_stops_early_is_what_was_trained_until_then(encoder, tmp_path):
    """The schedule is that of the whole training."""
    model = encoder()
    run(model, tmp_path / "out", callbacks=[StopAt(4)], save_steps=4)
    whole = encoder()
    run(whole, tmp_path / "whole", save_steps=4, save_total_limit=9)
    kept = SentenceTransformer(str(tmp_path / "whole-checkpoints" / "checkpoint-4"), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS[:4]), kept.encode(TEXTS[:4]))


def test_early_stopping_keeps_the_best_and_goes_on_with_its_patience(encoder, tmp_path):
    def options(**more):
        return dict(evaluator=Counting(top=2), eval_steps=1, callbacks=[EarlyStoppingCallback(3)], **more)

    whole = encoder()
    trained = run(whole, tmp_path / "whole", **options())
    assert trained.info["best_step"] == 1 and trained.info["stopped_at"] == 4
    part, stopping = encoder(), EarlyStoppingCallback(3)
    for again in (False, True):
        more = {"callbacks": [stopping] if again else [Interrupt(4), stopping]}
        evaluator = Counting(top=2)
        evaluator.calls = 3 if again else 0
        if not again:
            with pytest.raises(KeyboardInterrupt):
                run(part, tmp_path / "part", **options() | more | {"evaluator": evaluator})
            continue
        resumed = run(part, tmp_path / "part", **options(resume=True) | more | {"evaluator": evaluator})
    assert resumed.info["stopped_at"] == 4 and resumed.info["best_step"] == 1
    same(part, whole)
    finished = run(encoder(), tmp_path / "part", **options(resume=True))  # it had stopped: there is no step left
    assert finished.info["stopped_at"] == 4


def test_states_of_own_callbacks_are_those_of_the_checkpoint(encoder, tmp_path):
    seen, model = Seen(), encoder()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", callbacks=[seen, Interrupt(6)], save_steps=4)
    assert seen.steps == 5
    run(model, tmp_path / "out", callbacks=[seen], save_steps=4, resume=True)
    assert seen.steps == 8


# interrupts


@pytest.mark.parametrize("step", [2, 6], ids=["before a checkpoint", "behind one"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_goes_on_with_the_same_objects(encoder, tmp_path, step, error):
    data = pairs()
    whole = encoder()
    expected = run(whole, tmp_path / "whole", data, save_steps=3)
    live, untouched = encoder(), encoder()
    live[0].model.encoder.layer[0].train()  # parts of a model may be in another mode
    modes = [module.training for module in live.modules()]
    wrapped = TrainingError if error is RuntimeError else error
    with pytest.raises(wrapped):
        run(live, tmp_path / "out", data, save_steps=3, callbacks=[Interrupt(step, error)])
    same(live, untouched)
    assert [module.training for module in live.modules()] == modes
    assert all(parameter.grad is None for parameter in live.parameters())
    assert "forward" not in vars(live)
    resumed = run(live, tmp_path / "out", data, save_steps=3, resume=True)
    same(live, whole)
    for depth, projection in expected.projections.items():
        same(resumed.projections[depth], projection)


def test_a_pretraining_goes_on_with_the_same_objects(encoder, tmp_path):
    texts = some_texts(40, seed=6, longest=30)
    options = dict(steps=6, batch_size=4, learning_rate=1e-3, progress=False, save_steps=2)
    whole, live = encoder("bert"), encoder("bert")
    pretrain(whole, texts, CUPS, pretrain_config(output_dir=tmp_path / "whole", **options))
    for callbacks, resume in (([Interrupt(4)], False), ([Interrupt(6)], True)):
        with pytest.raises(KeyboardInterrupt):
            config = pretrain_config(output_dir=tmp_path / "out", callbacks=callbacks, resume=resume, **options)
            pretrain(live, texts, CUPS, config)
        same(live, encoder("bert"))
    pretrain(live, texts, CUPS, pretrain_config(output_dir=tmp_path / "out", resume=True, **options))
    same(live, whole)


def test_mixed_precision_is_taken_off_the_model_again(encoder, tmp_path):
    model = encoder()
    run(model, tmp_path / "out", bf16=True)
    assert "forward" not in vars(model)
    kept = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS), kept.encode(TEXTS), rtol=0, atol=1e-6)


def test_weights_that_cannot_be_saved_are_not_lost(encoder, tmp_path, monkeypatch):
    """Without a checkpoint the trained model is all there is."""
    monkeypatch.setattr("nestling.embed.training.run.save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    model = encoder()
    with pytest.raises(OSError):
        run(model, tmp_path / "out", save_strategy="no")
    assert not torch.equal(model[0].model.embeddings.word_embeddings.weight,
                           encoder()[0].model.embeddings.word_embeddings.weight)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2},
        {"logging_steps": 3},
        {"save_total_limit": None},
    ],
    ids=str,
)
def test_options_that_leave_the_result_as_it_is(encoder, tmp_path, options):
    one, other = encoder(), encoder()
    run(one, tmp_path / "one", **options)
    run(other, tmp_path / "other")
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 if "gradient_accumulation_steps" in options else 0)
