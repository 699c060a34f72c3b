"""What an encoder is trained on, and how: options that fit together, the loss of every size, the identity of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import batch_to_device
from torch import nn

from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.fingerprint import checksum, reading
from nestling.embed.model.modes import in_eval_mode
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection, check_turns
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.arguments import relevant
from nestling.embed.training.base_losses import check_labels
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.data import Examples
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.trainer import check_finite
from nestling.errors import ExampleError, OptionError, TrainingError
from nestling.jobs.processes import processes
from nestling.options import shown


@dataclass(frozen=True)
class TrainingJob:
    """What is trained on what, and how.

    Attributes:
        ladder: the sizes.
        given: the user's loss, or None.
        projections: what small sizes start from: a kind that is fitted, projections by depth, or None.
        prompts, teacher_prompts: by column, those that are not empty.
    """

    encoder: Encoder
    examples: Examples
    ladder: Ladder
    config: TrainConfig
    given: Any
    teacher: SentenceTransformer | None
    projections: str | Mapping[int, Projection] | None
    prompts: dict[str, str]
    teacher_prompts: dict[str, str]

    @property
    def distils(self) -> bool:
        """Whether an external teacher's embeddings are followed."""
        return not isinstance(self.given, StarbucksLoss) and self.teacher is not None

    @property
    def steps(self) -> int:
        """Steps of the optimiser."""
        assert self.config.steps is not None  # they follow from the rows where nobody says
        return self.config.steps

    @property
    def batch(self) -> int:
        """Rows a step, over all processes."""
        assert self.config.batch_size is not None
        return self.config.batch_size

    @property
    def trains_projections(self) -> bool:
        """Whether there are projections, and they are trained with the model."""
        return bool(self.projections) and bool(self.config.projection_rate)

    def check(self) -> None:
        """Refuse options that do not go together, and labels that the loss cannot use.

        Raises:
            OptionError, ExampleError: what, and why.
        """
        name, model, config = type(self.given).__name__, self.encoder.model, self.config
        if self.given is not None and getattr(self.given, "model", model) is not model:
            raise OptionError(f"the {name} is of another model: make it of the one that is trained")
        if isinstance(self.given, StarbucksLoss):
            changed = [key for key in LOSS_FIELDS if getattr(config, key) != getattr(TrainConfig(), key)]
            also = ["teacher"] * (self.teacher is not None) + changed
            if also:
                raise OptionError(f"a StarbucksLoss has its own {', '.join(also)}: give those to it, or a base loss")
        if config.mini_batch_size is not None and (self.given is not None or self.examples.kind != "pairs"):
            raise OptionError(
                f"mini_batch_size={config.mini_batch_size} is for pairs without a loss of your own: give a loss that "
                "caches gradients"
            )
        if self.distils and self.examples.labels is not None:
            raise OptionError("a teacher takes the place of labels: give pairs or texts, or leave the teacher out")
        check_labels(self.given, self.examples.labels)
        self._check_similarity()

    def _check_similarity(self) -> None:
        """Our losses, and teachers, are of cosines: a model of dot products or distances would become one of them."""
        similarity = Similarity.of(self.encoder.model)
        if similarity.unit:
            return
        cosines = (self.given if isinstance(self.given, StarbucksLoss) else self.config).normalize
        if cosines or self.given is None or self.teacher is not None:
            raise OptionError(
                f"the model compares by {similarity.words}, in which lengths count, and this trains cosines: give a "
                "loss of that similarity with normalize=False and no teacher, or set "
                'model.similarity_fn_name = "cosine" to train it for cosines'
            )
        if isinstance(self.projections, str):
            check_turns(similarity, self.projections)

    def identity(self) -> dict[str, Any]:
        """What a resumed training must agree on: plain JSON values."""
        data = [self.examples.kind, self.examples.columns, self.examples.labels]
        start: Any = self.projections
        if isinstance(start, Mapping):
            start = {str(depth): checksum(module) for depth, module in start.items()}
        base, taught = self.base(), self.teacher
        return {
            **self.config.identity(), "model": checksum(self.encoder.model), **reading(self.encoder.model),
            "sizes": str(self.ladder), "kind": self.examples.kind, "rows": len(self.examples), "data": checksum(data),
            "loss": None if base is None else type(base).__name__, "loss_settings": settings_of(base),
            "teacher": None if taught is None else {"model": checksum(taught), **reading(taught)},
            "projection": start, "prompts": self.prompts, "teacher_prompts": self.teacher_prompts,
            "arguments": relevant(self.config.arguments or {}),
        }  # fmt: skip

    def base(self) -> nn.Module | None:
        """The loss of one size."""
        model: Any = self.encoder.model
        if self.given is not None:
            return self.given
        if self.examples.kind == "scored":
            return losses.CoSENTLoss(model)
        if self.config.mini_batch_size is None:
            return losses.MultipleNegativesRankingLoss(model)
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=self.config.mini_batch_size)

    def loss(self, projections, table) -> StarbucksLoss:
        """The loss of all sizes."""
        if isinstance(self.given, StarbucksLoss):
            return self.given
        base = self.base()
        gathers = processes() > 1 and not getattr(base, "gather_across_devices", False)
        weights = {"full": max(1.0, len(self.ladder) - 1.0), **(self.config.weights or {})}
        return StarbucksLoss(
            self.encoder.model, base, self.ladder, replace(self.config, weights=weights), projections=projections,
            teacher=table, gather_across_devices=gathers,
        )  # fmt: skip


LOSS_FIELDS = ("kl_weight", "temperature", "weights", "cascade")


def settings_of(loss: Any) -> Any:
    """What a loss says of its settings, and a teacher's table by its checksum: plain JSON values."""
    if loss is None or not hasattr(loss, "get_config_dict"):
        return None
    found = dict(loss.get_config_dict())
    if isinstance(loss, StarbucksLoss) and loss.teacher is not None:
        found["external_teacher"] = checksum(loss.teacher)

    def plain(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return {"loss": type(value).__name__, "settings": settings_of(value)}
        return getattr(value, "__name__", type(value).__name__)  # a function: its address is another in every process

    return json.loads(json.dumps(found, default=plain))


def ladder_of(encoder: Encoder, sizes: Any) -> Ladder:
    """The sizes that are asked for, or those that suit the model; checked against it."""
    found = Ladder.default(encoder.depth, encoder.dims) if sizes is None else Ladder.parse(sizes)
    return found.check(encoder.depth, encoder.dims)


def teacher_of(teacher: Any, prompts: Any) -> SentenceTransformer | None:
    """The teacher, if it is one.

    Raises:
        OptionError: it is none, or there are prompts for one that is not there.
    """
    if teacher is None and prompts:
        raise OptionError(f"teacher_prompts={prompts!r} without a teacher: give one, or use prompts")
    if teacher is not None and not isinstance(teacher, SentenceTransformer):
        raise OptionError(f"teacher={shown(teacher)}: expected a SentenceTransformer or an ElasticEncoder")
    return teacher


def prompts_of(
    asked: str | Mapping[str, str] | None, examples: Examples, model: SentenceTransformer
) -> dict[str, str]:
    """The prompt of each column that has one; ``model``'s own where none is asked for.

    Rows of ``query, passage`` say what each text is for: they take the model's prompts for that, negatives the
    passage's. Other rows do not, and take the prompt that ``encode`` uses by itself, which few models have.
    """
    columns = examples.columns
    stored = stored_prompts(model)
    if isinstance(asked, str):
        found = dict.fromkeys(columns, asked)
    elif {"query", "passage"} <= set(columns):
        found = {name: stored["query" if name == "query" else "passage"] for name in columns}
    else:
        found = dict.fromkeys(columns, stored["sts"])
    if isinstance(asked, Mapping):
        if unknown := set(asked) - set(columns):
            raise OptionError(f"there are no columns {sorted(unknown)} to prompt: expected {', '.join(columns)}")
        found |= asked
    return {name: prompt for name, prompt in found.items() if prompt}


def dry_run(job: TrainingJob, loss: StarbucksLoss) -> None:
    """Compute the loss of a few rows, so that what cannot be computed is said before anything is written.

    Raises:
        ExampleError: the loss cannot use the rows or their labels.
        TrainingError: it is not finite.
    """
    examples = job.examples
    some = min(4, len(examples))
    model: Any = loss.model
    features = [
        batch_to_device(model.preprocess(column[:some], prompt=job.prompts.get(name)), model.device)
        for name, column in examples.columns.items()
    ]
    count = len(features)
    labels = torch.arange(some * count).view(some, count) if job.distils else None
    gathers, loss.gather_across_devices = loss.gather_across_devices, False
    try:
        if examples.labels is not None:
            labels = torch.tensor(examples.labels[:some])
        with in_eval_mode(model), torch.no_grad():
            parts = loss.to(model.device)(features, None if labels is None else labels.to(model.device))
    except (TypeError, AttributeError, IndexError, RuntimeError) as error:
        shown = "none" if examples.labels is None else f"like {examples.labels[0]!r}"
        raise ExampleError(
            f"{type(loss.loss).__name__} cannot be computed of {count} columns of texts with labels {shown} "
            f"({error}): give it the rows that it needs, or choose another loss"
        ) from error
    finally:
        loss.gather_across_devices = gathers
    try:
        check_finite(parts)
    except TrainingError as error:
        raise TrainingError(f"before the first step {error}: the weights are broken, or the labels are") from error
