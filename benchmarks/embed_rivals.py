"""Ways to get encoders of several sizes out of one, all on the same rows in the same batches, for as many steps.

Each way writes sentence-transformers folders and is not run again where they are.
"""

import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer import losses

from nestling import embed
from nestling.embed.examples import Examples, order
from nestling.embed.files import ROTATIONS_FILE, read_rotations
from nestling.embed.rotation import rotations
from nestling.embed.trainer import CupTrainer
from nestling.ladder import Cup, Ladder
from nestling.pairs import Pair

TRAINED_LENGTH = 64  # tokens of a text; what is measured is longer


@dataclass(frozen=True)
class Job:
    """What all ways have in common."""

    model: str
    ladder: Ladder
    rows: list[Pair]  # with their prompts
    dev: list[dict]
    work: Path
    steps: int
    batch: int
    learning_rate: float
    seed: int
    teacher: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of embed.train, for the ways that use the ladder

    def encoder(self, length: int = TRAINED_LENGTH) -> SentenceTransformer:
        return _loaded(self.model, length)

    def evaluator(self, ladder: Any) -> embed.GridEvaluator:
        return embed.GridEvaluator(ladder, sts={"dev": self.dev})


@dataclass(frozen=True)
class Sized:
    """An encoder to measure in some cups, and what it took to train it."""

    folder: str | Path
    ladder: Ladder
    minutes: float = 0.0
    peak_mib: float | None = None
    turns: dict | None = None  # start rotations by depth

    def encoder(self, length: int) -> SentenceTransformer:
        return _loaded(self.folder, length)


class Unprompted(SentenceTransformer):
    """A teacher that does not know the prompts of its student."""

    def encode(self, sentences, **options):  # type: ignore[override]
        return super().encode(
            [text.removeprefix("query: ").removeprefix("passage: ") for text in sentences], **options
        )


def cut(job: Job, rotation: str | None = None) -> list[Sized]:
    """The model as it is, perhaps with start rotations."""
    turns = None
    if rotation:
        texts = list(dict.fromkeys(text for row in job.rows for text in row.values()))[:5000]
        turns = rotations(job.encoder(), texts, job.ladder.layers, centred=rotation == "centred")
    return [Sized(job.model, job.ladder, turns=turns)]


def full(job: Job) -> list[Sized]:
    """Trained at full size only, then cut."""
    return [_ours(job, "full", job.encoder(), Ladder([job.ladder.full]), measured=job.ladder)]


def srl(job: Job, name: str = "srl", **options: Any) -> list[Sized]:
    """Every cup on every step."""
    return [_ours(job, name, job.encoder(), job.ladder, **(job.options | options))]


def taught(job: Job) -> list[Sized]:
    """The same, and all cups follow a strong teacher too."""
    if job.teacher is None:
        raise ValueError("the way srl-teacher needs --teacher")
    teacher = embed.load_encoder(job.teacher)
    teacher.__class__ = Unprompted
    return srl(job, "srl-teacher", teacher=teacher)


def separate(job: Job) -> list[Sized]:
    """A model for each cup, cut and then trained by itself. Its Dense starts as the cut and is trained too."""
    return [_ours(job, f"separate-{cup}", _small(job, cup), Ladder([cup])) for cup in job.ladder.cups[:-1]]


def students(job: Job) -> list[Sized]:
    """The same, where each also follows the similarities of the model that was trained at full size."""
    found = []
    for cup in job.ladder.cups[:-1]:
        teacher = full(job)[0].encoder(TRAINED_LENGTH)
        found.append(_ours(job, f"student-{cup}", _small(job, cup), Ladder([cup]), teacher=teacher))
    return found


def stock(job: Job, name: str, kind: type) -> list[Sized]:
    """A loss of sentence-transformers with its own trainer, on the batches of `embed.train`.

    Without a Normalize module, which would hide the lengths of vectors from the KL of Matryoshka2dLoss.
    """

    def train(folder: Path) -> None:
        encoder = job.encoder()
        model = SentenceTransformer(modules=[m for m in encoder.children() if not isinstance(m, Normalize)])
        model.prompts, model.default_prompt_name = encoder.prompts, encoder.default_prompt_name
        dims = sorted({cup.dims for cup in job.ladder}, reverse=True)
        loss = kind(model, losses.MultipleNegativesRankingLoss(model), dims)
        often = max(1, job.steps // 3)
        examples = Examples.of(job.rows)
        data = Dataset.from_dict(examples.columns).select(order(examples, job.batch, job.steps, job.seed).tolist())
        arguments = SentenceTransformerTrainingArguments(
            f"{folder}-checkpoints", per_device_train_batch_size=job.batch, max_steps=job.steps, seed=job.seed,
            learning_rate=job.learning_rate, warmup_steps=round(0.1 * job.steps), report_to="none", save_steps=often,
            eval_strategy="steps", eval_steps=often, load_best_model_at_end=True, metric_for_best_model="eval_mean",
            save_total_limit=2,
        )  # fmt: skip
        CupTrainer(model, arguments, train_dataset=data, loss=loss, evaluator=job.evaluator(job.ladder)).train()
        model.save_pretrained(str(folder), create_model_card=False)

    return [_once(job, name, train, job.ladder)]


def _ours(job: Job, name: str, model: SentenceTransformer, ladder: Ladder, measured=None, **options: Any) -> Sized:
    often = max(1, job.steps // 3)

    def train(folder: Path) -> None:
        embed.train(
            model, job.rows, ladder, folder=folder, steps=job.steps, batch_size=job.batch, seed=job.seed,
            learning_rate=job.learning_rate, evaluator=job.evaluator(ladder), prompts="", teacher_prompts="",
            eval_on_start=False, save_steps=often, **options,
        )  # fmt: skip

    return _once(job, name, train, measured or ladder)


def _once(job: Job, name: str, train: Callable[[Path], None], measured: Ladder) -> Sized:
    """Train into a folder, unless it is there."""
    folder, notes = job.work / name, job.work / f"{name}.json"
    if not notes.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-checkpoints", ignore_errors=True)
        start = time.monotonic()
        train(folder)
        minutes = (time.monotonic() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        notes.write_text(json.dumps({"minutes": minutes, "peak_mib": peak}))
        shutil.rmtree(f"{folder}-checkpoints", ignore_errors=True)
    path = folder / ROTATIONS_FILE
    turns = read_rotations(path) if path.is_file() else None
    return Sized(folder, measured, turns=turns, **json.loads(notes.read_text()))


def _small(job: Job, cup: Cup) -> SentenceTransformer:
    folder = job.work / f"cut-{cup}"
    if not folder.is_dir():
        embed.export(job.encoder(), cup, folder)
    return _loaded(folder, TRAINED_LENGTH)


def _loaded(name: str | Path, length: int) -> SentenceTransformer:
    model = embed.load_encoder(name)
    model.max_seq_length = length
    return model


WAYS: dict[str, Callable[[Job], list[Sized]]] = {
    "cut": cut,
    "cut-pca": partial(cut, rotation="pca"),
    "cut-centred": partial(cut, rotation="centred"),
    "full": full,
    "mrl": partial(stock, name="mrl", kind=losses.MatryoshkaLoss),
    "2dmse": partial(stock, name="2dmse", kind=losses.Matryoshka2dLoss),
    "separate": separate,
    "students": students,
    "srl": srl,
    "srl-teacher": taught,
}
