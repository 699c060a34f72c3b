"""MatryoshkaKV training (arXiv 2410.14731): rotate an adapter's bases so that every prefix of coordinates works.

The loop is transformers' Trainer. A text comes with the ranks that it is read at, drawn beforehand by its number, so
that resuming, shuffling and several processes need no state of their own. The teacher is the same model without
projections; only the rotations train, and LoRA weights where the model has them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from nestling.data.windows import token_windows
from nestling.errors import BudgetError, MissingExtraError, OptionError, TrainingError
from nestling.jobs.arguments import remove_printer, stopped
from nestling.jobs.callbacks import made, restore, stops_early
from nestling.jobs.checkpoints import begin, check_place, run
from nestling.jobs.progress import progress_bar
from nestling.jobs.undo import Undo, withdrawn
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.allocate import steps_of
from nestling.kv.allocation.table import Allocation
from nestling.kv.cache.rule import check_length
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.fit import fit, measure
from nestling.kv.integration.attach import (
    attach,
    check_head,
    head_shape,
    input_device,
    leaves_as_found,
    longest_text,
    text_config,
)
from nestling.kv.integration.gradients import check_gradients
from nestling.kv.integration.modes import in_default_mode
from nestling.kv.quantisation.packing import COORDINATES_PER_BLOCK
from nestling.kv.simulation.student import Student
from nestling.kv.training.arguments import training_arguments
from nestling.kv.training.config import TrainConfig
from nestling.kv.training.sampling import RankedWindows, schedule


@leaves_as_found
@in_default_mode
def train(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    adapter: KVAdapter | None = None,
    config: TrainConfig | None = None,
    *,
    eval_texts: Iterable[str] | Tensor | None = None,
    labels: Tensor | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
) -> KVAdapter:
    """Train an adapter's bases by distillation under sampled ranks.

    Under ``torchrun`` every process calls this; all get the same adapter.

    Args:
        model: the causal LM. Frozen; of a peft model the parameters that require gradients train along.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``; read again from the start where they are fewer than the tokens.
        adapter: the bases to start from; None calibrates on the same texts.
        config: how to train, and where checkpoints are written. What is kept is the last step, not the best.
        eval_texts: held-out text. Its KL at shares of the ranks (exact tokens not counted; with sampled bits, at
            shares of 16 bits) is the training curve.
        labels: for fine-tuning, next tokens ``[n, T]`` in step with ``texts`` of ids, `nestling.losses.IGNORED` where
            nothing is learned (prompts, padding on the right); see `nestling.data.windows.answer_windows`.
        callbacks: of transformers, as objects or classes; those that say their state go on with it when a training is
            resumed.

    Returns:
        The trained `KVAdapter`, costs measured again; ``info["training"]`` has the options and the curve.

    Raises:
        TrainingError: if the loss or a gradient is not finite (step and layer are named), if a checkpoint cannot be
            written, or if its folder holds another job's; the last whole checkpoint is kept.
        TextTooShortError, AdapterError, UnsupportedModelError.
    """
    if find_spec("accelerate") is None:
        raise MissingExtraError("training needs accelerate: pip install 'nestling[train]'")
    config, own = TrainConfig.of(config), made(callbacks)
    folder, evaluates = config.output_dir, eval_texts is not None
    if stops_early(own):
        raise OptionError("EarlyStoppingCallback: what is kept is the last step, there is no best one")
    check_place(folder, config.resume)
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables = _tables(adapter, config, head_shape(text_config(lm))[2])
    check_gradients(lm)
    windows = _windows(lm, tokenizer, texts, config)
    length = windows.shape[1]
    if labels is not None and (labels.shape[1:] != windows.shape[1:] or len(labels) < len(windows)):
        raise OptionError(f"labels are {list(labels.shape)}, expected {list(windows.shape)}, in step with the texts")
    steps = max(1, config.tokens // (length * config.batch_size))
    options = training_arguments(config, steps, max(1, len(windows) // config.batch_size), evaluates)
    held_out = windows[:0]
    if eval_texts is not None:
        held_out = torch.stack(list(token_windows(tokenizer, eval_texts, length, limit=config.eval_windows)))
    costs = FitConfig(length=length, sinks=config.sinks, window=config.window, seed=config.seed, basis=config.basis)
    if adapter is None:
        adapter = fit(lm, None, windows, costs, progress=config.progress)
        tables = _tables(adapter, config)
    adapter.check(lm)
    attach(lm)
    check_head(lm, windows[:1, :16].to(input_device(lm)))
    bits = schedule(config.sampling, adapter, allocation=config.allocation, seed=config.seed)
    data = RankedWindows(windows, bits, config.seed, steps * config.batch_size, labels)
    budgets = {name: RankedWindows.fixed(held_out, table) for name, table in tables.items()}
    curve = _Curve(steps, length * config.batch_size, config.progress)
    with withdrawn(folder, unless=lambda: curve.started):
        checkpoint = begin(folder, _job(adapter, config, windows, steps), config.resume)
        restore(own, checkpoint)
        with _frozen(model, lm):
            student = Student(
                lm, adapter, kl_weight=config.kl_weight, ce_weight=config.ce_weight, sinks=config.sinks,
                window=config.window,
            )  # fmt: skip
            layers = adapter.fingerprint["layers"]
            student.bases.rotation.x.register_hook(lambda gradient: _check_gradient(gradient, layers))
            undo = Undo(student)  # of LoRA weights, which are the user's
            try:
                trainer = Trainer(
                    student, options, train_dataset=data, eval_dataset=budgets if evaluates else None,
                    callbacks=[curve, *own],
                )  # fmt: skip
                remove_printer(trainer)
                seconds = run(trainer, folder, checkpoint)
                encodes = student.bases.encodes()
            except BaseException:
                undo.put_back()
                raise
            finally:
                curve.bar.stop()
    measured = {"tokens": steps * config.batch_size * length, "seconds": round(seconds), **stopped(trainer, steps)}
    training = {**config.to_dict(), **measured, "length": length, "steps": steps, "curve": curve.points}
    trained = KVAdapter(
        adapter.fingerprint, encodes, adapter.mean, adapter.drop_cost, {**adapter.info, "training": training},
        drift=adapter.drift,
    )  # fmt: skip
    return measure(lm, trained, windows, costs, progress=config.progress)


def _windows(lm, tokenizer, texts: Iterable[str] | Tensor, config: TrainConfig) -> Tensor:
    """The windows ``[n, T]`` that are trained on, as many as the tokens ask for."""
    length = min(config.length, longest_text(lm) or config.length)
    check_length(length, config.sinks, config.window)
    return torch.stack(list(token_windows(tokenizer, texts, length, limit=-(-config.tokens // length))))


@contextmanager
def _frozen(model, lm) -> Iterator[None]:
    """The language model without gradients, but for those of adapters of peft; what was is put back."""
    flags, mode = {p: p.requires_grad for p in lm.parameters()}, lm.training
    try:
        if lm is model:
            lm.requires_grad_(False)
        yield
    finally:
        lm.train(mode)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _tables(adapter: KVAdapter | None, config: TrainConfig, width: int = 0) -> dict[str, Allocation]:
    """What a held-out text is read at, by share; none without an adapter, of heads of ``width``.

    Raises:
        BudgetError: a share is out of reach, which is known without an adapter too.
    """
    if adapter is None:
        least = min(COORDINATES_PER_BLOCK, width) / width
        for budget in config.budgets if config.sampling != "bits" else ():
            if (budget.share or 0) < least:
                raise BudgetError(f"{budget.given} is below the smallest possible, {least:.4g}")
        return {}
    steps = steps_of(adapter) if config.sampling == "bits" else steps_of(adapter, config.allocation, quantise=False)
    return {f"{budget.share:g}": steps.required(budget) for budget in config.budgets}


class _Curve(TrainerCallback):
    """The progress bar, and the KL at fixed budgets as it falls: ``{"step", "tokens", "kl_0.5", ...}``."""

    def __init__(self, steps: int, tokens_per_step: int, progress: bool):
        self.points: list[dict] = []
        self.started = False
        self.tokens_per_step = tokens_per_step
        self.bar = progress_bar(progress)
        self.task = self.bar.add_task("training", total=steps)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.start()
        self.points = _curve(state.log_history, self.tokens_per_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = True

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.points = _curve(state.log_history, self.tokens_per_step)
        shown = {k.removeprefix("kl_"): f"{v:.3f}" for k, v in (self.points or [{}])[-1].items() if k.startswith("kl")}
        kl = ", ".join(f"{budget}: {value}" for budget, value in shown.items())
        self.bar.update(self.task, description=f"training, KL {kl}" if kl else "training")


def _curve(history: list[dict], tokens_per_step: int) -> list[dict]:
    points: dict[int, dict] = {}
    for entry in history:
        point = points.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["step"] * tokens_per_step})
        for name, value in entry.items():
            if name == "loss":
                point["loss"] = value
            elif name.startswith("eval_") and name.endswith("_loss"):
                point[f"kl_{name[5:-5]}"] = value
    return [points[step] for step in sorted(points)]


def _job(adapter: KVAdapter, config: TrainConfig, windows: Tensor, steps: int) -> dict[str, Any]:
    """What a resumed training must agree on: plain JSON values."""
    checksum = sum(float(e.double().abs().sum()) for e in adapter.encode.values())
    return {
        "model": adapter.fingerprint, **config.to_dict(), "start": f"{checksum:.6g}", "windows": list(windows.shape),
        "first": windows[0, :8].tolist(), "steps": steps,
    }  # fmt: skip


def _check_gradient(gradient: Tensor, layers: list[int]) -> None:
    finite = torch.isfinite(gradient).flatten(3).all(-1).all(-1)  # [2, L]
    if not finite.all():
        side, row = (~finite).nonzero()[0].tolist()
        raise TrainingError(f"the gradient by the {('keys', 'values')[side]} of layer {layers[row]} is not finite")
