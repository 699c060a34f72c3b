"""Ways to get encoders of several sizes out of one, all on the same rows in the same batches, for as many steps.

Each way writes sentence-transformers folders and is not run again where they are. Every training has a process of its
own, so that its peak memory is its own.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer import losses

from nestling import embed
from nestling.data.pairs import Pair
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.fingerprint import checksum
from nestling.embed.model.folder import PROJECTIONS_FILE, read_projections, write_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import fit_projections
from nestling.embed.training.data import Examples, order
from nestling.embed.training.trainer import SizesTrainer
from nestling.report.results import write_json

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
    bf16: bool = False  # trainings under autocast, measured in bf16
    length: int = 128  # tokens of a text that is measured

    def begin(self) -> None:
        """Make WORK, or check that what is in it was trained by this job.

        Raises:
            ValueError: it is another's; what differs is named.
        """
        mine = {
            "model": self.model, "ladder": str(self.ladder), "steps": self.steps, "batch": self.batch,
            "learning_rate": self.learning_rate, "seed": self.seed, "rows": len(self.rows),
            "data": checksum([self.rows, self.dev]), "length": TRAINED_LENGTH, "bf16": self.bf16,
        }  # fmt: skip
        path = self.work / "job.json"
        if not path.is_file():
            if self.work.is_dir() and any(self.work.iterdir()):
                raise ValueError(f"{self.work} holds something else: choose another folder")
            self.work.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(mine, indent=2))
        theirs = json.loads(path.read_text())
        if wrong := [f"{key}: {theirs.get(key)}, now {mine[key]}" for key in mine if theirs.get(key) != mine[key]]:
            raise ValueError(
                f"{self.work} holds the trainings of another job ({'; '.join(wrong)}): choose another folder"
            )

    def encoder(self) -> SentenceTransformer:
        return loaded(self.model, TRAINED_LENGTH)

    def evaluator(self, ladder: Any) -> "Timed":
        return Timed(ladder, sts={"dev": self.dev})


@dataclass(frozen=True)
class Sized:
    """An encoder to measure in some cups, and what it took to train it."""

    folder: str | Path
    ladder: Ladder
    minutes: float = 0.0
    peak_mib: float | None = None
    projections: Path | None = None  # a file


class Timed(embed.GridEvaluator):
    """An evaluator that adds up how long it takes, over all copies of it in a process."""

    seconds = 0.0

    def __call__(self, *args, **options):
        start = time.monotonic()
        try:
            return super().__call__(*args, **options)
        finally:
            Timed.seconds += time.monotonic() - start


class Unprompted(SentenceTransformer):
    """A teacher that does not know the prompts of its student."""

    def encode(self, sentences, **options):  # type: ignore[override]
        return super().encode(
            [text.removeprefix("query: ").removeprefix("passage: ") for text in sentences], **options
        )


def apart(function: Callable, *args: Any) -> Any:
    """The result of a function in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def loaded(name: str | Path, length: int) -> SentenceTransformer:
    model = load_encoder(name)
    model.max_seq_length = length
    return model


def cut(job: Job, projection: str | None = None) -> list[Sized]:
    """The model as it is, perhaps with start projections."""
    path = None if projection is None else job.work / f"cut-{projection}.safetensors"
    if path is not None and not path.is_file():
        apart(_projections, job, projection, path)
    return [Sized(job.model, job.ladder, projections=path)]


def full(job: Job) -> list[Sized]:
    """Trained at full size only, then cut."""
    return [_once(job, "full-then-cut", job.ladder, _ours, Ladder([job.ladder.full]))]


def srl(job: Job) -> list[Sized]:
    """Every cup on every step."""
    return [_once(job, "srl", job.ladder, _ours, job.ladder)]


def plain_srl(job: Job) -> list[Sized]:
    """The same as in the paper: nothing between pooling and cut, and the full cup counts as much as any other."""
    return [_once(job, "srl-plain", job.ladder, _ours, job.ladder, None, None, True)]


def taught(job: Job) -> list[Sized]:
    """The same, and all cups follow a strong teacher too."""
    name = f"srl-teacher-{Path(str(job.teacher)).name}"
    return [_once(job, name, job.ladder, _ours, job.ladder, None, job.teacher)]


def separate(job: Job) -> list[Sized]:
    """A model for each cup, cut and then trained by itself. Its Dense starts as the cut and is trained too."""
    cups = job.ladder.sizes[:-1]
    return [_once(job, f"separate-{cup}", Ladder([cup]), _ours, Ladder([cup]), _small(job, cup)) for cup in cups]


def student(job: Job) -> list[Sized]:
    """The same for the cup in the middle, which also follows the similarities of the model trained at full size."""
    (teacher,), cups = full(job), job.ladder.sizes[:-1]
    cup = cups[len(cups) // 2]
    return [_once(job, f"student-{cup}", Ladder([cup]), _ours, Ladder([cup]), _small(job, cup), teacher.folder)]


def stock(job: Job, name: str) -> list[Sized]:
    """A loss of sentence-transformers with its own trainer, on the batches of `ElasticEncoder.train`."""
    return [_once(job, name, job.ladder, _stock, name)]


def _once(job: Job, name: str, measured: Ladder, train: Callable[..., float], *args: Any) -> Sized:
    """Train into a folder, unless it is there."""
    folder, notes = job.work / name, job.work / f"{name}.json"
    if not notes.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-checkpoints", ignore_errors=True)
        write_json(notes, [], apart(_trained, train, job, folder, *args))
        shutil.rmtree(f"{folder}-checkpoints", ignore_errors=True)
    path = folder / PROJECTIONS_FILE
    return Sized(
        folder, measured, **json.loads(notes.read_text())["meta"], projections=path if path.is_file() else None
    )


def _trained(train: Callable[..., float], job: Job, folder: Path, *args: Any) -> dict[str, float]:
    """Minutes of a training without those on the dev set, and the peak memory of this process."""
    minutes = train(job, folder, *args)
    # What getrusage tells would be the parent's peak, if that is higher: it outlives the start of a new program.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"minutes": minutes, "peak_mib": int(peak[1]) / 1024 if peak else float("nan")}


def _ours(
    job: Job, folder: Path, ladder: Ladder, start: Path | None = None, teacher: str | Path | None = None,
    plain: bool = False,
) -> float:  # fmt: skip
    """A training of the model, or of a smaller start. A teacher's embedding of all texts is in the time."""
    model = job.encoder() if start is None else loaded(start, TRAINED_LENGTH)
    guide = None if teacher is None else load_encoder(teacher)
    if guide is not None and teacher == job.teacher:
        guide.__class__ = Unprompted
        guide.max_seq_length = TRAINED_LENGTH
        guide.bfloat16()  # its cosines move by 1e-4, and it is much larger than its students
    make = embed.TrainConfig.paper if plain else embed.TrainConfig
    config = make(
        output_dir=folder, steps=job.steps, batch_size=job.batch, seed=job.seed, learning_rate=job.learning_rate,
        prompts="", teacher_prompts=None if guide is None else "", bf16=job.bf16,
        arguments={"eval_on_start": False, "save_steps": max(1, job.steps // 3)},
    )  # fmt: skip
    began = time.monotonic()
    embed.ElasticEncoder(model, ladder).train(job.rows, config, evaluator=job.evaluator(ladder), teacher=guide)
    return (time.monotonic() - began - Timed.seconds) / 60


def _stock(job: Job, folder: Path, name: str) -> float:
    """Without a Normalize module, which would hide the lengths of vectors from the KL of Matryoshka2dLoss."""
    encoder = job.encoder()
    model = SentenceTransformer(modules=[m for m in encoder.children() if not isinstance(m, Normalize)])
    model.prompts, model.default_prompt_name = encoder.prompts, encoder.default_prompt_name
    dims = sorted({cup.dims for cup in job.ladder}, reverse=True)
    loss = STOCK[name](model, losses.MultipleNegativesRankingLoss(model), dims)
    often = max(1, job.steps // 3)
    examples = Examples.of(job.rows)
    data = Dataset.from_dict(examples.columns).select(order(examples, job.batch, job.steps, job.seed).tolist())
    arguments = SentenceTransformerTrainingArguments(
        f"{folder}-checkpoints", per_device_train_batch_size=job.batch, max_steps=job.steps, seed=job.seed,
        learning_rate=job.learning_rate, warmup_steps=round(0.1 * job.steps), report_to="none", save_steps=often,
        eval_strategy="steps", eval_steps=often, load_best_model_at_end=True, metric_for_best_model="eval_mean",
        save_total_limit=2, bf16=job.bf16,
    )  # fmt: skip
    began = time.monotonic()
    SizesTrainer(model, arguments, train_dataset=data, loss=loss, evaluator=job.evaluator(job.ladder)).train()
    model.save_pretrained(str(folder), create_model_card=False)
    return (time.monotonic() - began - Timed.seconds) / 60


def _projections(job: Job, kind: Any, path: Path) -> None:
    texts = list(dict.fromkeys(text for row in job.rows for text in row.values()))[:10_000]
    write_projections(path, fit_projections(job.encoder(), texts, job.ladder.layers[:-1], kind=kind))


def _small(job: Job, cup: Size) -> Path:
    """The folder of a cup that is cut and not trained."""
    folder = job.work / f"cut-{cup}"
    if not folder.is_dir():
        apart(_export, job, cup, folder)
    return folder


def _export(job: Job, cup: Size, folder: Path) -> None:
    embed.ElasticEncoder(job.encoder(), [cup]).export(cup, folder)


def projections_of(sized: Sized) -> dict | None:
    """What `GridEvaluator` applies, if there is something."""
    return None if sized.projections is None else read_projections(sized.projections)


STOCK = {"st-mrl": losses.MatryoshkaLoss, "st-2d": losses.Matryoshka2dLoss}
WAYS: dict[str, Callable[[Job], list[Sized]]] = {
    "cut": cut,
    "cut-pca": partial(cut, projection="pca"),
    "cut-centred": partial(cut, projection="centred"),
    "cut-aligned": partial(cut, projection="aligned"),
    "full-then-cut": full,
    "st-mrl": partial(stock, name="st-mrl"),
    "st-2d": partial(stock, name="st-2d"),
    "separate": separate,
    "student": student,
    "srl-plain": plain_srl,
    "srl": srl,
    "srl-teacher": taught,
}
