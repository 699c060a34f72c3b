"""A training of bases and the stock trainer's words: callbacks, interrupts, intervals; what cannot be is refused."""

from importlib import import_module

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from nestling.errors import NestlingError

from ..families import tiny_model
from .test_train import run, same


@pytest.fixture(scope="module")
def start(fitted):
    return fitted("llama-gqa").adapter


class Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 5


def with_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama-gqa"), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("step", [2, 6], ids=["before a checkpoint", "behind one"])
def test_an_interrupted_training_goes_on_with_the_same_objects(tmp_path, ids, start, step):
    """LoRA weights train along, and are the user's."""
    whole, live = with_lora(), with_lora()
    expected = run(tmp_path / "whole", ids, start, whole, save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", ids, start, live, save_steps=3, callbacks=[Interrupt(step)])
    for one, other in zip(live.parameters(), with_lora().parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.requires_grad == other.requires_grad and one.grad is None
    found = run(tmp_path / "out", ids, start, live, save_steps=3, resume=True)
    same(found, expected)
    for one, other in zip(live.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_passes_over_the_texts_are_epochs_and_callbacks_stop(tmp_path, ids, start):
    run(tmp_path / "out", ids[:16], start, save_strategy="epoch")  # 12 steps of 4
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-8", "checkpoint-12"}
    part = run(tmp_path / "part", ids, start, callbacks=StopAt)
    assert part.info["training"]["stopped_at"] == 5


REFUSED = [
    *({"callbacks": value} for value in (5, ["x"], [EarlyStoppingCallback(2)])),
    *({name: value} for name in ("tokens", "length", "batch_size", "eval_windows") for value in (0, -1, 2.5, None)),
    *({"seed": value} for value in (-1, 2**32, "x")),
    *({"resume": value} for value in (1, "x")),
    *({"budgets": value} for value in ((0,), (2,), ("x",), 5, (float("nan"),), ())),
    *({"preset": value} for value in ("best", None, 5)),
    *({"arguments": value} for value in (5, {5: 1}, {"learning_rate": 1}, {"output_dir": "x"}, {"bf16": True})),
    {"nonsense": 1}, {"kl_weight": -1}, {"kl_weight": 0}, {"learning_rate": 0},
    {"sinks": -1}, {"window": 1.5}, {"basis": "x"}, {"sampling": "x"},
    *({"output_dir": value} for value in (None, 5, "")),
    *({name: 1} for name in ("num_train_epochs", "label_names", "optimizers", "train_dataset")),
    *({name: True} for name in ("load_best_model_at_end", "auto_find_batch_size", "ignore_data_skip")),
    {"metric_for_best_model": "loss"}, {"save_strategy": "best"}, {"eval_steps": 2}, {"eval_strategy": "epoch"},
    *({"save_steps": value} for value in (0, -1, "x", float("nan"))),
    *({"max_steps": value} for value in (0, -1, "x")),
    *({"gradient_accumulation_steps": value} for value in (0, "2")),
    {"weight_decay": -1}, {"bf16": "x"}, {"report_to": "nobody"}, {"optim": "nonsense"}, {"eval_step": 3},
    {"lr_scheduler_kwargs": {"nonsense": 1}},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=[f"{i}-{'-'.join(o)}" for i, o in enumerate(REFUSED)])
def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path, ids, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        import_module("nestling.kv.training.train"), "fit", lambda *_, **__: pytest.fail("it was calibrated")
    )
    with pytest.raises(NestlingError):
        run(tmp_path / "out", ids, None, **{"sinks": 0, "window": 0, **options})
    assert not list(tmp_path.iterdir())
