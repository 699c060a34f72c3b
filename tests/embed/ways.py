"""Trainings and alignments of tests in one call each, with the options that most of them share."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from nestling.embed import ElasticEncoder, LossConfig, StarbucksLoss, TrainConfig
from nestling.embed.model.own import own_projections
from nestling.embed.training.result import Trained
from nestling.embed.training.train import train as train_model

FIELDS = {field.name for field in fields(TrainConfig)}


def config_of(folder: Path | None = None, **options: Any) -> TrainConfig:
    """A `TrainConfig`; options that are no fields of it are the stock trainer's arguments.

    Nothing is held out, unless a test says so.
    """
    named = {name: value for name, value in options.items() if name in FIELDS}
    rest = {name: value for name, value in options.items() if name not in FIELDS}
    return TrainConfig(**{"output_dir": folder, "held_out": 0, "progress": False, "arguments": rest, **named})


def train(model, data, cups=None, *, folder=None, loss=None, teacher=None, evaluator=None, projections=None,
                 **options: Any) -> Trained:  # fmt: skip
    """What `ElasticEncoder.train` calls, of a stock model; of texts each makes a pair with the next one."""
    if loss is None and isinstance(data, list) and data and all(isinstance(row, str) for row in data):
        data = [{"anchor": one, "positive": other} for one, other in zip(data, data[1:] + data[:1], strict=True)]
    config = config_of(folder, **options)
    projections = own_projections(model) if projections is None else projections
    return train_model(
        model, data, cups, config, projections=projections, loss=loss, teacher=teacher, evaluator=evaluator
    )


def loss_of(model, loss, sizes, *, projections=None, teacher=None, gather_across_devices=False,
            **options: Any) -> StarbucksLoss:  # fmt: skip
    """A `StarbucksLoss`, with the options of its config by name."""
    return StarbucksLoss(
        model, loss, sizes, LossConfig(**options), projections=projections, teacher=teacher,
        gather_across_devices=gather_across_devices,
    )  # fmt: skip


def align(model, texts, cups=None, *, folder: Path, **options: Any) -> Trained:
    """An encoder of a stock model, aligned and saved."""
    encoder = ElasticEncoder(model, cups).align(texts, **{"progress": False, **options})
    encoder.save_pretrained(folder)
    return Trained(folder, encoder.sizes, encoder.projections, encoder.info["alignment"])
