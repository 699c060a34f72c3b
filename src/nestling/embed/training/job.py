"""What an encoder is trained on, and how: options that fit together, the loss of every cup, the identity of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import batch_to_device
from torch import nn

from nestling.embed.ladder import Ladder
from nestling.embed.model.fingerprint import checksum, reading
from nestling.embed.model.modes import in_eval_mode
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import KINDS, Projection, check_turns
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.arguments import check_changes, processes, relevant
from nestling.embed.training.base_losses import check_labels
from nestling.embed.training.data import Examples
from nestling.embed.training.loss import StarbucksLoss
from nestling.embed.training.trainer import check_finite
from nestling.errors import ExampleError, OptionError, TrainingError
from nestling.options import shown


@dataclass(frozen=True)
class Plan:
    """What is trained on what: the parts that do not change."""

    encoder: Encoder
    examples: Examples
    given: Any  # the user's loss
    teacher: SentenceTransformer | None

    @property
    def distils(self) -> bool:
        """Whether an external teacher's embeddings are followed, perhaps those of the model as it was."""
        return not isinstance(self.given, StarbucksLoss) and (
            self.teacher is not None or self.examples.kind == "texts"
        )

    def check(self, cups, recipe, projection, mini_batch_size, arguments) -> None:
        """Options that do not go together, and labels that the loss cannot use."""
        name, model = type(self.given).__name__, self.encoder.model
        if self.teacher is not None and not isinstance(self.teacher, SentenceTransformer):
            raise OptionError(
                f"teacher={shown(self.teacher)}: expected a SentenceTransformer, as load_encoder makes one"
            )
        turns = list(projection.values()) if isinstance(projection, Mapping) else []
        if not isinstance(projection, str | Mapping | None) or not all(isinstance(turn, Projection) for turn in turns):
            raise OptionError(
                f"projection={shown(projection)}: expected auto, {', '.join(KINDS)}, or projections by depth"
            )
        if isinstance(projection, str) and projection not in ("auto", *KINDS):
            raise OptionError(
                f"projection must be auto, {', '.join(KINDS)}, or projections by depth, got {projection!r}"
            )
        if self.given is not None and getattr(self.given, "model", model) is not model:
            raise OptionError(f"the {name} is of another model: make it of the one that is trained")
        if isinstance(self.given, StarbucksLoss):
            asked = None if projection == "auto" else projection
            also = {"cups": cups, "teacher": self.teacher, "recipe": recipe, "projection": asked}
            if wrong := [key for key, value in also.items() if value is not None]:
                raise OptionError(f"a StarbucksLoss has its own {', '.join(wrong)}: give those to it, or a base loss")
        if mini_batch_size is not None and (self.given is not None or self.examples.kind != "pairs"):
            raise OptionError(
                f"mini_batch_size={mini_batch_size} is for pairs without a loss of your own: give a loss that caches "
                "gradients"
            )
        if self.distils and self.examples.labels is not None:
            raise OptionError("a teacher takes the place of labels: give pairs or texts, or leave the teacher out")
        check_labels(self.given, self.examples.labels)
        check_changes(arguments)
        self._check_similarity(recipe, "aligned" if projection == "auto" else projection)

    def _check_similarity(self, recipe: Mapping[str, Any] | None, projection: Any) -> None:
        """Our losses, and teachers, are of cosines: a model of dot products or distances would become one of them."""
        similarity = Similarity.of(self.encoder.model)
        if similarity.unit:
            return
        cosines = (
            self.given.normalize if isinstance(self.given, StarbucksLoss) else (recipe or {}).get("normalize", True)
        )
        if cosines or self.given is None or self.teacher is not None:
            raise OptionError(
                f"the model compares by {similarity.words}, in which lengths count, and this trains cosines: give a "
                "loss of that similarity with recipe={'normalize': False} and no teacher, or set "
                'model.similarity_fn_name = "cosine" to train it for cosines'
            )
        if isinstance(projection, str):
            check_turns(similarity, projection)

    def job(
        self, ladder, steps, batch, learning_rate, warmup, seed, prompts, teacher_prompts, recipe, projection,
        mini_batch_size, arguments,
    ) -> dict[str, Any]:  # fmt: skip
        """What a resumed training must agree on: plain JSON values."""
        data = [self.examples.kind, self.examples.columns, self.examples.labels]
        if isinstance(projection, Mapping):
            projection = {str(depth): checksum(module) for depth, module in projection.items()}
        base, taught = self.base(mini_batch_size), self.teacher
        weights = {str(cup): weight for cup, weight in ((recipe or {}).get("weights") or {}).items()}
        recipe = {**(recipe or {}), **({"weights": weights} if weights else {})}
        return {
            "model": checksum(self.encoder.model), **reading(self.encoder.model), "cups": str(ladder),
            "kind": self.examples.kind, "rows": len(self.examples), "data": checksum(data),
            "loss": None if base is None else type(base).__name__, "loss_settings": settings_of(base),
            "teacher": None if taught is None else {"model": checksum(taught), **reading(taught)},
            "projection": projection, "recipe": recipe, "prompts": prompts, "teacher_prompts": teacher_prompts,
            "steps": steps, "batch_size": batch, "learning_rate": learning_rate, "warmup": warmup, "seed": seed,
            "arguments": relevant(arguments),
        }  # fmt: skip

    def base(self, mini_batch_size: int | None) -> nn.Module | None:
        """The loss of one cup; none where texts are all there is."""
        model: Any = self.encoder.model
        if self.given is not None or self.examples.kind == "texts":
            return self.given
        if self.examples.kind == "scored":
            return losses.CoSENTLoss(model)
        if mini_batch_size is None:
            return losses.MultipleNegativesRankingLoss(model)
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)

    def loss(self, ladder: Ladder, recipe, mini_batch_size, projections, table) -> StarbucksLoss:
        """The loss of all cups."""
        if isinstance(self.given, StarbucksLoss):
            return self.given
        base = self.base(mini_batch_size)
        gathers = processes() > 1 and not getattr(base, "gather_across_devices", False)
        asked = {ladder.cup(cup): weight for cup, weight in ((recipe or {}).get("weights") or {}).items()}
        weights = {ladder.full: max(1.0, len(ladder) - 1.0)} | asked
        return StarbucksLoss(
            self.encoder.model, base, ladder, projections=projections, teacher=table,
            gather_across_devices=gathers, **{**(recipe or {}), "weights": weights},
        )  # fmt: skip


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


def ladder_of(encoder: Encoder, cups: Any) -> Ladder:
    """The sizes that are asked for, or those that suit the model; checked against it."""
    found = Ladder.default(encoder.depth, encoder.dims) if cups is None else Ladder.parse(cups)
    return found.check(encoder.depth, encoder.dims)


def prompts_of(asked: str | Mapping[str, str] | None, examples: Examples, stored: Mapping[str, str]) -> dict[str, str]:
    """The prompt of each column that has one.

    Rows of ``query, passage`` say what each text is for: they take the model's prompts for that, negatives the
    passage's. Other rows do not, and take the prompt that ``encode`` uses by itself, which few models have.
    """
    columns = examples.columns
    if asked is not None and not isinstance(asked, str) and not _are_texts(asked):
        raise OptionError(f"prompts={shown(asked)}: expected a text, or texts by column")
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


def _are_texts(prompts: Any) -> bool:
    return isinstance(prompts, Mapping) and all(isinstance(text, str) for text in [*prompts, *prompts.values()])


def attempt(loss: StarbucksLoss, examples: Examples, distils: bool, prompts: dict[str, str]) -> None:
    """Compute the loss of a few rows, so that what cannot be computed is said before anything is written.

    Raises:
        ValueError: the loss cannot use the rows or their labels.
        TrainingError: it is not finite.
    """
    some = min(4, len(examples))
    model: Any = loss.model
    features = [
        batch_to_device(model.preprocess(column[:some], prompt=prompts.get(name)), model.device)
        for name, column in examples.columns.items()
    ]
    count = len(features)
    labels = torch.arange(some * count).view(some, count) if distils else None
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
