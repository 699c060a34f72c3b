"""MatryoshkaKV training (arXiv 2410.14731): rotate an adapter's bases so that every prefix of coordinates works.

The loop is transformers' Trainer. A text comes with the ranks that it is read at, drawn beforehand by its number, so
that resuming, shuffling and several processes need no state of their own. The teacher is the same model without
projections; only the rotations train, and LoRA weights where the model has them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

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
from nestling.kv.allocation.bits import BitTable
from nestling.kv.allocation.budget import Budget, Budgets, read_shares
from nestling.kv.allocation.ranks import STEP, RankTable
from nestling.kv.cache.exact import check_length
from nestling.kv.cache.factory import bits_at, ranks_at
from nestling.kv.calibration.fit import fit
from nestling.kv.calibration.sensitivity import measure
from nestling.kv.integration import attach as attention
from nestling.kv.integration.gradients import check_gradients
from nestling.kv.integration.modes import in_default_mode
from nestling.kv.simulation.student import Student
from nestling.kv.training.arguments import Recipe, recipe_of, training_arguments
from nestling.kv.training.sampling import RankedWindows, schedule
from nestling.options import flag, path, whole

BUDGETS = (0.75, 0.5, 0.375, 0.25)


@attention.leaves_as_found
@in_default_mode
def train(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor,
    adapter: KVAdapter | None = None,
    preset: str = "default",
    *,
    folder: str | Path,
    labels: Tensor | None = None,
    tokens: int = 2**19,
    length: int = 512,
    batch_size: int = 8,
    eval_texts: Iterable[str] | Tensor | None = None,
    eval_windows: int = 4,
    eval_budgets: Budgets = BUDGETS,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    resume: bool = False,
    progress: bool = True,
    recipe: dict | None = None,
    **arguments,
) -> KVAdapter:
    """Train an adapter's bases by distillation under sampled ranks.

    Under ``torchrun`` every process calls this; all get the same adapter.

    Args:
        model: the causal LM. Frozen; of a peft model the parameters that require gradients train along.
        tokenizer: its tokenizer; None when ``texts`` are ids.
        texts: strings, or token ids ``[n, T]``; read again from the start where they are fewer than ``tokens``.
        adapter: the bases to start from; None calibrates on the same texts.
        preset: ``"default"``, or ``"paper"`` (PCA start, independent ranks, KL : CE = 1 : 3, everything compressed).
        folder: of checkpoints.
        labels: for fine-tuning, next tokens ``[n, T]`` in step with ``texts`` of ids, `nestling.losses.IGNORED` where
            nothing is learned (prompts, padding on the right); see `nestling.data.windows.answer_windows`.
        tokens: tokens to train on in all.
        length: tokens per text.
        batch_size: texts per step, over all processes.
        eval_texts, eval_windows, eval_budgets: held-out text, how many windows of it are read while training, and the
            shares of the ranks at which (exact tokens not counted); their KL is the training curve. With sampled bits
            they are shares of 16 bits.
        seed: of the order of texts, of the ranks and of the labels that the energies are measured with.
        callbacks: of transformers, as objects or classes; those that say their state go on with it when a training is
            resumed.
        resume: go on from the last whole checkpoint in ``folder``.
        recipe: changes to the preset, fields of `Recipe`.
        arguments: for transformers' `TrainingArguments`: ``bf16, gradient_checkpointing, save_steps, eval_steps,
            gradient_accumulation_steps, fsdp, ...``. What is kept is the last step, not the best.

    Returns:
        The trained `KVAdapter`, energies measured again; ``info["training"]`` has the recipe and the curve.

    Raises:
        TrainingError: if the loss or a gradient is not finite (step and layer are named), if a checkpoint cannot be
            written, or if ``folder`` holds another job's; the last whole checkpoint is kept.
        TextTooShortError, AdapterError, UnsupportedModelError.
    """
    if find_spec("accelerate") is None:
        raise MissingExtraError("training needs accelerate: pip install 'nestling[train]'")
    chosen, folder, own = recipe_of(preset, recipe), path("folder", folder), made(callbacks)
    tokens, length, batch_size = whole("tokens", tokens), whole("length", length), whole("batch_size", batch_size)
    eval_windows, seed = whole("eval_windows", eval_windows), whole("seed", seed, 0, 2**32 - 1)
    resume, progress = flag("resume", resume), flag("progress", progress)
    asked = read_shares(eval_budgets, "eval_budgets")
    if stops_early(own):
        raise OptionError("EarlyStoppingCallback: what is kept is the last step, there is no best one")
    check_place(folder, resume)
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = attention.text_config(lm)
    tables = None if adapter is None else _tables(adapter, asked, chosen)
    width = attention.head_shape(config)[2]
    if tables is None and chosen.sampling != "bits":
        for budget in asked:
            if (budget.share or 0) < min(STEP, width) / width:
                raise BudgetError(f"{budget.given} is below the smallest possible, {min(STEP, width) / width:.4g}")
    check_gradients(lm)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    check_length(length, chosen.sinks, chosen.window)
    windows = torch.stack(list(token_windows(tokenizer, texts, length, limit=-(-tokens // length))))
    if labels is not None and (labels.shape[1:] != windows.shape[1:] or len(labels) < len(windows)):
        raise OptionError(f"labels are {list(labels.shape)}, expected {list(windows.shape)}, in step with the texts")
    steps = max(1, tokens // (length * batch_size))
    epoch, evaluates = max(1, len(windows) // batch_size), eval_texts is not None
    options = training_arguments(folder, steps, epoch, batch_size, chosen, seed, evaluates, arguments)
    held_out = windows[:0]
    if eval_texts is not None:
        held_out = torch.stack(list(token_windows(tokenizer, eval_texts, length, limit=eval_windows)))
    if adapter is None:
        adapter = fit(
            lm, None, windows, chosen.basis, length=length, sinks=chosen.sinks, window=chosen.window, seed=seed,
            progress=progress,
        )  # fmt: skip
    adapter.check(lm)
    attention.attach(lm)
    attention.check_head(lm, windows[:1, :16].to(attention.input_device(lm)))
    ranks = schedule(chosen.sampling, adapter, allocation=chosen.allocation, seed=seed)
    data = RankedWindows(windows, ranks, seed, steps * batch_size, labels)
    tables = tables or _tables(adapter, asked, chosen)
    budgets = {name: RankedWindows.fixed(held_out, table) for name, table in tables.items()}
    job = _job(adapter, preset, chosen, windows, steps, batch_size, seed)
    flags = {p: p.requires_grad for p in lm.parameters()}
    mode = lm.training
    curve = _Curve(steps, length * batch_size, progress)
    with withdrawn(folder, unless=lambda: curve.started):
        checkpoint = begin(folder, job, resume)
        restore(own, checkpoint)
        undo = None
        try:
            if lm is model:
                lm.requires_grad_(False)
            student = Student(
                lm, adapter, kl_weight=chosen.kl_weight, ce_weight=chosen.ce_weight, sinks=chosen.sinks,
                window=chosen.window,
            )  # fmt: skip
            student.bases.rotation.x.register_hook(
                lambda gradient: _check_gradient(gradient, adapter.fingerprint["layers"])
            )
            undo = Undo(student)  # of LoRA weights, which are the user's
            trainer = Trainer(
                student, options, train_dataset=data, eval_dataset=budgets if evaluates else None,
                callbacks=[curve, *own],
            )  # fmt: skip
            remove_printer(trainer)
            seconds = run(trainer, folder, checkpoint)
            encodes = student.bases.encodes()
        except BaseException:
            if undo is not None:
                undo.put_back()
            raise
        finally:
            curve.bar.stop()
            lm.train(mode)
            for parameter, flag_ in flags.items():
                parameter.requires_grad_(flag_)
    measured = {"tokens": steps * batch_size * length, "seconds": round(seconds), **stopped(trainer, steps)}
    sizes = {"length": length, "steps": steps, "batch_size": batch_size}
    training = {"preset": preset, **asdict(chosen), **measured, **sizes, "curve": curve.points}
    info = {**adapter.info, "training": training}
    trained = KVAdapter(adapter.fingerprint, encodes, adapter.mean, adapter.energy, info)
    return measure(lm, trained, windows, sinks=chosen.sinks, window=chosen.window, seed=seed, progress=progress)


def _tables(adapter: KVAdapter, budgets: Sequence[Budget], recipe: Recipe) -> dict[str, RankTable | BitTable]:
    """What a held-out text is read at, by share."""
    if recipe.sampling == "bits":
        return {f"{budget.share:g}": bits_at(adapter, budget) for budget in budgets}
    return {f"{budget.share:g}": ranks_at(adapter, budget, recipe.allocation) for budget in budgets}


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


def _job(adapter: KVAdapter, preset: str, recipe: Recipe, windows: Tensor, steps: int, batch_size: int, seed: int):
    """What a resumed training must agree on: plain JSON values."""
    checksum = sum(float(e.double().abs().sum()) for e in adapter.encode.values())
    return {
        "model": adapter.fingerprint, "preset": preset, **asdict(recipe), "start": f"{checksum:.6g}",
        "windows": list(windows.shape), "first": windows[0, :8].tolist(), "steps": steps, "batch_size": batch_size,
        "seed": seed,
    }  # fmt: skip


def _check_gradient(gradient: Tensor, layers: list[int]) -> None:
    finite = torch.isfinite(gradient).flatten(3).all(-1).all(-1)  # [2, L]
    if not finite.all():
        side, row = (~finite).nonzero()[0].tolist()
        raise TrainingError(f"the gradient by the {('keys', 'values')[side]} of layer {layers[row]} is not finite")
