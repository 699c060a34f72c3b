"""Distillation: small sizes learn to write the full model's vectors, from texts alone; the model stays as it is.

Only the layers up to the deepest small size are run. A teacher's vectors of the texts come from a mapped file, which
is filled as the training goes on; so a training that is limited in time computes no more of them than it needs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from nestling.embed.adapter import ElasticAdapter, space_of
from nestling.embed.ladder import Ladder
from nestling.embed.model.fingerprint import checksum, fingerprint
from nestling.embed.model.projection import Projection
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.data import Examples
from nestling.embed.training.distil_plan import OTHERS, Distillation, planned
from nestling.embed.training.follower import Follower, coordinates
from nestling.embed.training.start import SAMPLE
from nestling.embed.training.state import DistilState
from nestling.embed.training.targets import Targets
from nestling.errors import TrainingError
from nestling.jobs.progress import progress_bar

BUCKET = 64  # steps whose texts are sorted by length together
RATE, MAP_RATE, WARMUP, DECAY, CLIP = 1e-3, 5e-4, 0.05, 0.01, 1.0
POINTS = 10  # measurements of a training, beside that of its start
OFTEN = 500  # steps between checkpoints, at most


def distil(
    model: SentenceTransformer, examples: Examples, sizes: Any, config: TrainConfig, *, teacher: Any = None,
    evaluator: Any = None,
) -> ElasticAdapter:  # fmt: skip
    """Train small sizes to follow a teacher, the model itself by default: what `ElasticEncoder.train` does with texts.

    Returns:
        The adapter; it is not saved.

    Raises:
        As `ElasticEncoder.train`.
    """
    plan = planned(model, examples, sizes, config, teacher, evaluator)
    work = None if config.output_dir is None else config.output_dir.with_name(f"{config.output_dir.name}-checkpoints")
    with DistilState.opened(work, plan.identity(), config.resume) as state:
        return _run(plan, state)


def _run(plan: Distillation, state: DistilState) -> ElasticAdapter:
    config = plan.config
    targets = Targets(state.folder, plan.guide, plan.texts, plan.prompts[1], plan.autocast)
    follower = Follower(plan.encoder, plan.small, config.rank, config.seed)
    with progress_bar(config.progress) as bar:
        task = bar.add_task("vectors to start from", total=None)
        sample = list(range(0, len(plan.texts), -(-len(plan.texts) // SAMPLE)))
        targets.fill(sample)
        basis = coordinates(targets[sample], plan.encoder.dims)
        if not state.resumes:
            texts = [plan.texts[row] for row in sample]
            follower.align(texts, plan.prompts[0], targets[sample] @ basis, plan.autocast)
            state.measured(follower, _measured(plan, follower))
            state.steps = plan.steps
        else:
            follower.blank()
        groups = follower.groups(config.learning_rate or RATE, config.projection_rate
                                 if config.projection_rate is not None else MAP_RATE)  # fmt: skip
        optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
        state.put_back(follower, optimizer)
        bar.update(task, description="distilling", total=state.steps, completed=state.step)
        _train(plan, state, follower, optimizer, targets, basis, partial(bar.update, task))
    state.settle(follower)
    return _adapter(plan, state, follower, basis)


def _train(
    plan: Distillation, state: DistilState, follower: Follower, optimizer: torch.optim.Optimizer, targets: Targets,
    basis: Tensor, show: Callable[..., None],
) -> None:  # fmt: skip
    """From the state's step to the last one."""
    batch, peaks = plan.batch, [group["lr"] for group in optimizer.param_groups]
    rows = order([len(text) for text in plan.texts], batch, state.steps, plan.config.seed)
    minutes, filled = plan.config.minutes, None
    while (done := state.share(minutes)) < 1:
        step = state.step
        block = step // BUCKET
        if block != filled:
            targets.fill(rows[block * BUCKET * batch : (block + 1) * BUCKET * batch])
            filled = block
        some = rows[step * batch : (step + 1) * batch]
        parts = follower.losses(
            [plan.texts[row] for row in some], plan.prompts[0], targets[some], basis, plan.config, plan.autocast
        )
        torch.stack(list(parts.values())).sum().backward()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _rate(plan.config, done, 1 / state.steps)
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
        if not norm.isfinite():
            raise TrainingError(f"step {step + 1}: the loss or a gradient is not finite; {state.kept}")
        optimizer.step()
        optimizer.zero_grad()
        state.stepped({name: float(value.detach()) for name, value in parts.items()})
        show(completed=state.step, description=f"distilling, loss {sum(state.recent.values()) / state.counted:.3f}")
        due = int(POINTS * state.share(minutes) + 1e-9) > int(POINTS * done + 1e-9)
        if due:
            state.measured(follower, _measured(plan, follower))
        if due or state.step % OFTEN == 0:
            state.save(follower, optimizer)


def _measured(plan: Distillation, follower: Follower) -> dict[str, float]:
    """What the evaluator says of the small sizes; their ``mean`` is what checkpoints are chosen by."""
    if plan.measure is None:
        return {}
    measure = copy(plan.measure)
    asked = measure.ladder or plan.small
    measure.ladder = Ladder([size for size in asked if size.layers in plan.small.layers] or plan.small)
    measure.projections = follower.projections
    with torch.no_grad(), warnings.catch_warnings():
        return {name: float(value) for name, value in measure(follower.body).items()}


def _adapter(plan: Distillation, state: DistilState, follower: Follower, basis: Tensor) -> ElasticAdapter:
    model, projections = plan.encoder.model, dict(follower.projections)
    if plan.teacher is None:
        projections[plan.encoder.depth] = Projection(basis)
        teacher = fingerprint(model)
    else:
        teacher = {"weights": f"crc32 {checksum(plan.teacher)}"}
    options = {name: value for name, value in plan.config.identity().items() if name not in OTHERS}
    info = {
        **options, "exclude": None, "kind": "texts", "rows": len(plan.texts), "left_out": plan.left_out,
        "teacher": plan.teacher is not None, "prompts": list(plan.prompts), "batch_size": plan.batch,
        "steps": state.step, "held_out": len(getattr(plan.measure, "texts", ())), **state.info(),
    }  # fmt: skip
    changes: dict[str, tuple[Tensor, Tensor]] = {
        name: (change.down, change.up) for name, change in follower.changes.items()
    }
    name = str(model.model_card_data.base_model or "")
    adapter = ElasticAdapter(
        fingerprint(model), plan.sizes, changes, projections, space_of(teacher, basis), info, name
    )
    return adapter.described(model)


def order(lengths: list[int], batch: int, steps: int, seed: int) -> list[int]:
    """Rows of all batches, one batch after the other: passes in random order, sorted by length within a bucket."""
    generator = torch.Generator().manual_seed(seed)
    coming: list[int] = []
    while len(coming) < steps * batch:
        coming += torch.randperm(len(lengths), generator=generator).tolist()
    found: list[int] = []
    for start in range(0, steps * batch, BUCKET * batch):
        some = sorted(coming[start : min(start + BUCKET * batch, steps * batch)], key=lambda row: lengths[row])
        batches = [some[i : i + batch] for i in range(0, len(some), batch)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            found += batches[place]
    return found


def _rate(config: TrainConfig, done: float, each: float) -> float:
    """Share of the peak learning rate, by the share of the steps that is done: a linear rise, and a cosine."""
    rise = WARMUP if config.warmup is None else config.warmup
    return min(1.0, (done + each) / max(rise, each)) * 0.5 * (1 + math.cos(math.pi * done))
