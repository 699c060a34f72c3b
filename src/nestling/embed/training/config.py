"""How an encoder is trained: each option once, with its default, its line of help and its check."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.options import by_name, choice, flag, number, path, shown, text, whole

PROJECTIONS = ("auto", "aligned", "centred", "pca", "none")
# Options that leave the result as it is, so that a training can be resumed with others.
FREE = ("output_dir", "resume", "progress", "callbacks", "gradient_checkpointing", "arguments")
ABOVE_ZERO = partial(number, above=0)


def _weights(name: str, value: Any) -> dict[str, float]:
    """Weights by size, from a mapping or from texts such as 12x768=3."""
    if isinstance(value, list | tuple):
        value = dict(_pair(name, item, "a size and a number, such as 12x768=3") for item in value)
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={shown(value)}: expected weights by size, such as {{'12x768': 3.0}}")
    return {str(size): number(f"{name}[{size}]", _plain(weight), above=0) for size, weight in value.items()}


def _plain(weight: Any) -> Any:
    """A number that was written as text, as one."""
    try:
        return float(weight) if isinstance(weight, str) else weight
    except ValueError:
        return weight


def _prompts(name: str, value: Any) -> str | dict[str, str]:
    """A prompt of all columns, or prompts by column, from a mapping or from texts such as anchor='query: '."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        value = dict(_pair(name, item, "a name and a text, such as query='query: '") for item in value)
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for part in [*value, *value.values()]):
        raise OptionError(f"{name}={shown(value)}: expected a text, or texts by column")
    return dict(value)


def _pair(name: str, item: Any, expected: str) -> tuple[str, str]:
    key, equals, value = text(name, item).partition("=")
    if not equals:
        raise OptionError(f"{name} {item!r}: expected {expected}")
    return key.strip(), value


_arguments = partial(by_name, owner="SentenceTransformerTrainingArguments")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """How the sizes learn from each other: options of `StarbucksLoss`."""

    kl_weight: float = option(
        1.0, "How much small sizes follow the full one, against the loss; 0: not at all.", partial(number, minimum=0)
    )
    temperature: float = option(0.05, "What similarities are divided by before rankings are compared.", ABOVE_ZERO)
    weights: dict[str, float] | None = option(
        None, "Weight of a size, such as 12x768=3; may be repeated; default: the full one's is that of all others.",
        _weights, flags=("--weight",), cli=list[str] | None,
    )  # fmt: skip
    cascade: bool = option(False, "Each size follows the next larger one, not the full one.", flag)
    normalize: bool = option(True, "Vectors are normalised after the cut, as cosines need it.", flag, cli=False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LossConfig):
    """Options of `ElasticEncoder.train`. The full size weighs as much as all others together, unless weights name it;
    where texts are followed it is not trained at all.

    Attributes:
        output_dir: folder for the trained encoder, which must not exist; checkpoints go beside it, into
            ``<output_dir>-checkpoints``. None: nothing is kept but the object, and a killed training starts again.
        epochs: passes over the data; one if neither these nor ``steps`` are given.
        minutes: of texts, how long it takes at most; the learning rate then falls with the time, and the result hangs
            on the machine.
        texts: of those that there are, so many are drawn.
        exclude: texts that must not be trained on, since they are measured on; the name of a file of them, or of rows
            all of whose columns count; or several names as ``pathlib.Path``. Case and punctuation do not count.
        rank: of the low-rank changes of layers that texts train.
        batch_size: rows a step, over all processes and accumulation steps; by default 64, or all rows if there are
            fewer. No text comes twice in a batch where that can be had.
        mini_batch_size: rows of pairs that are embedded at a time, with cached gradients: large batches in little
            memory.
        projection: what is done to the pooled vectors of the depths below the full one before they are cut (at the
            full depth too, if narrower sizes share it). ``"auto"``: the encoder's own, or else ``"aligned"`` with the
            embeddings of the teacher or of the full model; ``"centred"`` and ``"pca"``: their principal components;
            ``"none"``: nothing. See `fit_projections`. A `StarbucksLoss` has its own.
        projection_rate: learning rate of the projections, which are trained as any linear maps; 0: they stay.
        prompts: in front of texts, for all columns or by column. Columns that are left out have the model's own: in
            rows of ``query, passage`` its prompts for queries and for passages, in others the one that ``encode`` uses
            by itself. ``""`` turns one off. They become the model's own, so that it is measured and served with them.
        teacher_prompts: the same for the teacher.
        dropout: whether the model's dropout is on, by default it is; never where texts are followed.
        held_out: rows that are measured on and not trained on where no evaluator is given, a tenth of all at most: the
            checkpoint that is best there is kept, or the start, if none is better. 0: the last step is kept.
        resume: go on from the last whole checkpoint, to the result of a training that was never stopped.
        callbacks: of transformers, as objects or classes. Those that say their state (EarlyStoppingCallback, or your
            own with ``ExportableState``) go on with it when a training is resumed.
        arguments: further SentenceTransformerTrainingArguments by name, ``save_steps, eval_steps, save_strategy,
            metric_for_best_model, gradient_accumulation_steps, weight_decay, ...``; not those that have a field here,
            nor ``torch_compile``. An epoch is one pass over the data.
    """

    output_dir: Path | None = option(None, "Folder for the trained encoder.", path, cli=False)
    steps: int | None = option(None, "Steps of the optimiser; default: by --epochs.", whole)
    epochs: float | None = option(None, "Passes over the data; default: 1.", ABOVE_ZERO)
    batch_size: int | None = option(None, "Rows a step, over all processes; default: 64.", whole)
    mini_batch_size: int | None = option(None, "Rows embedded at a time, for large batches.", whole)
    minutes: float | None = option(None, "Time for texts, at most; default: as --epochs take.", ABOVE_ZERO)
    texts: int | None = option(None, "Texts to follow at most; default: all.", whole)
    exclude: Any = option(
        None, "File of texts or rows that are not trained on, if --text has them; may be repeated.",
        flags=("--exclude",), cli=list[Path] | None,
    )  # fmt: skip
    rank: int = option(32, "Rank of the changes to layers, for texts.", whole)
    learning_rate: float | None = option(
        None, "Peak learning rate (AdamW); default: 5e-5 for pairs, 1e-3 for texts.", ABOVE_ZERO
    )
    warmup: float | None = option(
        None, "Share of the steps in which the learning rate rises; default: 0.1 for pairs, 0.05 for texts.",
        partial(number, minimum=0, below=1),
    )  # fmt: skip
    projection: str = option(
        "auto", "Start of small sizes: aligned, centred, pca or none; default: MODEL's own, else aligned.",
        partial(choice, known=PROJECTIONS),
    )  # fmt: skip
    projection_rate: float | None = option(
        None, "Learning rate of the projections; 0: they stay; default: 5e-3 for pairs, 5e-4 for texts.",
        partial(number, minimum=0),
    )  # fmt: skip
    prompts: str | dict[str, str] | None = option(
        None, "Prompt by column, such as anchor='query: '; may be repeated; default: the model's own.", _prompts,
        flags=("--prompt",), cli=list[str] | None,
    )  # fmt: skip
    teacher_prompts: str | dict[str, str] | None = option(None, "Prompts of the teacher.", _prompts, cli=False)
    dropout: bool | None = option(None, "Whether dropout is on; default: not for texts.", flag, cli=False)
    held_out: int = option(
        500, "Rows to measure on where no --sts or --retrieval is named; 0: none.", partial(whole, minimum=0)
    )
    seed: int = option(0, "Seed of the order of rows and of dropout.", partial(whole, minimum=0, maximum=2**32 - 1))
    bf16: bool | None = option(None, "Compute in bf16; default: for texts, where the processor has it.", flag)
    gradient_checkpointing: bool = option(
        False, "Recompute activations: less memory, a third slower.", flag, flags=("--checkpointing",)
    )
    resume: bool = option(False, "Go on from the last checkpoint.", flag)
    progress: bool = option(True, "Show a progress bar.", flag, cli=False)
    callbacks: Any = option((), "Callbacks of transformers.", cli=False)
    arguments: Mapping[str, Any] | None = option(None, "Further training arguments.", _arguments, cli=False)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise OptionError(f"steps={self.steps} and epochs={self.epochs:g}: both say how long, leave one out")

    @classmethod
    def paper(cls, **changes: Any) -> "TrainConfig":
        """SRL as it was published (arXiv 2410.13230): vectors are cut as they come, and all sizes count alike."""
        return cls(**{"projection": "none", "weights": {"full": 1.0}, **changes})

    def identity(self) -> dict[str, Any]:
        """The options that the result depends on: what a training that is resumed must agree on."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE}
