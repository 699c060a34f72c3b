"""What a training cannot do is refused with a typed error, before anything is computed or written."""

import warnings

import pytest
from sentence_transformers.sentence_transformer import evaluation, losses
from transformers import EarlyStoppingCallback, TrainerCallback

from nestling.embed import GridEvaluator
from nestling.embed.pretraining.pretrain import pretrain
from nestling.errors import EvaluationError, NestlingError, OptionError

from ..families import some_texts
from ..pretraining.test_pretrain import config as pretrain_config
from .test_train import CUPS, same
from .test_trainer import STS, run, stock


def nothing_left(folder) -> bool:
    return not list(folder.parent.glob(f"{folder.name}*")) and not list(folder.parent.glob(f".{folder.name}*"))


class Broken(evaluation.SentenceEvaluator):
    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        raise ZeroDivisionError("broken")


REFUSED = [
    *({"evaluator": value} for value in ("EmbeddingSimilarityEvaluator", [], 5, [stock, "x"], {"dev": 1}, len)),
    *({"loss": value} for value in ("MultipleNegativeRankingLoss", "nn", 5, {}, {"a": "CoSENTLoss", "b": int})),
    *({"loss": value} for value in (losses.MarginMSELoss, losses.SoftmaxLoss, losses.MatryoshkaLoss, lambda model: 5)),
    *({"callbacks": value} for value in (5, "EarlyStoppingCallback", [object()], [int], [lambda: None])),
    {"callbacks": [EarlyStoppingCallback(2)]},
    {"callbacks": [EarlyStoppingCallback], "evaluator": stock(), "eval_strategy": "no"},
    *({name: 4} for name in ("eval_steps",)),
    {"eval_strategy": "steps"},
    {"load_best_model_at_end": True},
    {"metric_for_best_model": "mean"},
    {"save_strategy": "best"},
    {"evaluator": stock(), "metric_for_best_model": "mean_sts"},
    {"evaluator": GridEvaluator(sts={"dev": STS}), "metric_for_best_model": "3x8_mean_sts"},
    {"evaluator": stock(), "load_best_model_at_end": True, "save_strategy": "no"},
    {"evaluator": stock(), "load_best_model_at_end": True, "eval_strategy": "no"},
    {"evaluator": stock(), "eval_steps": 3, "save_steps": 4},
    *({name: "sometimes"} for name in ("save_strategy", "eval_strategy", "logging_strategy")),
    *({name: "sometimes"} for name in ("lr_scheduler_type", "optim")),
    *({"save_steps": value} for value in (0, -1, 1.5, float("nan"), float("inf"), "4", True)),
    *({"evaluator": stock(), "eval_steps": value} for value in (0, -1, float("nan"), [])),
    *({"logging_steps": value} for value in (0, -3, "x")),
    *({"gradient_accumulation_steps": value} for value in (0, -1, 2.5, "2")),
    *({"dataloader_num_workers": value} for value in (-1, "x", 1.5)),
    *({"weight_decay": value} for value in (-1, "x", float("nan"))),
    *({"max_grad_norm": value} for value in (-1, None, float("inf"))),
    *({"adam_beta1": value} for value in (1.5, -1, "x")),
    *({"save_total_limit": value} for value in (0, -1, "x")),
    *({"bf16": value} for value in (1, "yes")),
    {"bf16": True, "fp16": True},
    {"report_to": "nobody"},
    {"lr_scheduler_kwargs": {"nonsense": 1}},
    *({"learning_rate_mapping": value} for value in ({"nonsense": 1e-3}, "1e-3", 5)),
    *({name: 1} for name in ("num_train_epochs", "warmup_steps", "warmup_ratio", "max_steps", "data_seed")),
    *({name: 1} for name in ("args", "train_dataset", "eval_dataset", "optimizers", "compute_metrics", "model_init")),
    *({name: True} for name in ("auto_find_batch_size", "ignore_data_skip", "torch_compile")),
    {"neftune_noise_alpha": 5.0},
    {"eval_step": 5},
    *({"steps": value} for value in (0, -1, 2.5, float("nan"), "3", True)),
    *({"steps": None, "epochs": value} for value in (0, -1, float("nan"), float("inf"), "x")),
    {"epochs": 1},
    *({"batch_size": value} for value in (0, -8, 2.5, "8", True)),
    *({"mini_batch_size": value} for value in (0, -2, 1.5, "x")),
    *({"learning_rate": value} for value in (0, -1, float("nan"), float("inf"), "x")),
    *({"projection_rate": value} for value in (-1, float("nan"), "x")),
    *({"warmup": value} for value in (-0.1, 1, float("nan"), "x")),
    *({name: 4} for name in ("minutes", "texts", "exclude", "rank")),
    *({"seed": value} for value in (-1, 2**32, 1.5, "x", None)),
    *({name: value} for name in ("resume", "progress") for value in (1, "no", None)),
    {"dropout": "on"},
    *({"projection": value} for value in ("nonsense", 5, {1: "x"}, [1])),
    {"kl_weight": -1},
    {"temperature": 0},
    *({"weights": value} for value in ({"9x9": 1.0}, {"4x32": float("nan")}, {"4x32": 0}, {"4x32": "x"}, 5, ["4x32"])),
    *({name: "yes"} for name in ("cascade", "normalize", "kl_weight")),
    *({"held_out": value} for value in (-1, 2.5, "x", None)),
    *({"arguments": value} for value in (5, ["bf16"])),
    *({"prompts": value} for value in (5, {"anchor": 5}, {"nobody": "x"}, ["x"])),
    *({"teacher": value} for value in ("minilm", 5)),
    *({"output_dir": value} for value in (5, "", b"x", [])),
    {"output_dir": None, "resume": True},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=[f"{i}-{'-'.join(o)}" for i, o in enumerate(REFUSED)])
def test_what_cannot_be_is_refused_before_anything_is_computed(encoder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    model, untouched = encoder(), encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NestlingError) as caught:
            run(model, **{"folder": tmp_path / "out", **options})
    assert isinstance(caught.value, ValueError)
    assert not list(tmp_path.iterdir())
    same(model, untouched)
    assert any(word in str(caught.value) for word in words_of(options)), caught.value


def words_of(value) -> list[str]:
    """Names and values of which a message has to have one."""
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in (str(name), *words_of(item))]
    if isinstance(value, list):
        return [word for item in value for word in words_of(item)]
    return [str(value), getattr(value, "__name__", type(value).__name__)]


def test_an_evaluator_that_cannot_measure_is_found_at_once(encoder, tmp_path):
    columns = [["a", "b"], ["c", "d"], [0.5]]
    for evaluator in (Broken(), [stock(), Broken()]):
        with pytest.raises(EvaluationError, match="Broken"):
            run(encoder(), tmp_path / "out", evaluator=evaluator)
    with pytest.raises(EvaluationError):
        evaluator = stock()
        evaluator.sentences1, evaluator.sentences2, evaluator.scores = columns
        run(encoder(), tmp_path / "out", evaluator=evaluator)
    assert nothing_left(tmp_path / "out")


def test_a_callback_that_fails_at_the_start_leaves_no_folder(encoder, tmp_path):
    class Fails(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise AssertionError("of the user's own")

    with pytest.raises(AssertionError, match="own"):
        run(encoder(), tmp_path / "out", callbacks=[Fails()])
    assert nothing_left(tmp_path / "out")


def test_a_pretraining_refuses_at_once_too(encoder, tmp_path):
    texts = some_texts(40, seed=6, longest=30)
    refused = [
        {"callbacks": [EarlyStoppingCallback(1)]}, {"save_strategy": "epoch"}, {"eval_steps": 2},
        {"load_best_model_at_end": True}, {"weight_decay": "x"}, {"optim": "nonsense"}, {"report_to": "nobody"},
        {"steps": 0}, {"steps": 2.5}, {"batch_size": 0}, {"length": 0}, {"length": -5}, {"encoder_ratio": 0},
        {"encoder_ratio": 1.5}, {"decoder_ratio": float("nan")}, {"sizes_per_step": -1}, {"sizes_per_step": None},
        {"learning_rate": float("inf")}, {"warmup": 1}, {"seed": -1}, {"dropout": "x"}, {"skip_bad": 1},
        {"decoder": "nonsense"}, {"output_dir": None}, {"output_dir": 5}, {"output_dir": ""},
        {"lr_scheduler_kwargs": {"nonsense": 1}},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(NestlingError):
            given = dict(output_dir=tmp_path / "out", steps=2, batch_size=4, progress=False)
            pretrain(encoder("bert"), texts, CUPS, pretrain_config(**{**given, **options}))
        assert nothing_left(tmp_path / "out"), options


def test_unknown_options_are_told_from_those_of_other_names(encoder, tmp_path):
    with pytest.raises(OptionError, match="eval_steps"):
        run(encoder(), tmp_path / "out", eval_step=5)
    with pytest.raises(OptionError, match="epochs"):
        run(encoder(), tmp_path / "out", num_train_epochs=2)
