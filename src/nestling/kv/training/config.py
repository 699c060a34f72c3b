"""Options of the training of bases. torch is not imported, so that a command shows them quickly."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from nestling.config import Config, option
from nestling.errors import OptionError
from nestling.kv.allocation.budget import SINKS, WINDOW, Budget, read_shares
from nestling.kv.calibration.config import AUTO, BASES
from nestling.options import by_name, choice, flag, natural, number, path, text, whole

SAMPLINGS = ("path", "independent", "bits")
BUDGETS = "75,50,37.5,25"
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "basis": AUTO,
        "sampling": "path",
        "allocation": "energy",
        "kl_weight": 1.0,
        "ce_weight": 0.0,
        "learning_rate": 2e-3,
        "sinks": SINKS,
        "window": WINDOW,
    },
    "paper": {
        "basis": "pca",
        "sampling": "independent",
        "allocation": "uniform",
        "kl_weight": 0.25,
        "ce_weight": 0.75,
        "learning_rate": 1e-3,
        "sinks": 0,
        "window": 0,
    },
}
# What does not change the result, or may be changed when a training is resumed.
NOT_ITS_IDENTITY = (
    "output_dir", "resume", "progress", "budgets", "eval_windows", "bf16", "gradient_checkpointing", "arguments",
)  # fmt: skip
DEFAULT = "Default: the preset's."


def _shares(name: str, value: Any) -> list[Budget]:
    return read_shares(value, name)


_arguments = partial(by_name, owner="transformers' TrainingArguments")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How `nestling.kv.train` trains.

    A preset gives the options that are None: ``"default"``, or ``"paper"``, which starts from PCA, draws independent
    ranks, weighs KL : CE as 1 : 3 and compresses everything. What else the stock trainer can do goes into
    ``arguments``, such as ``{"save_steps": 50, "gradient_accumulation_steps": 2}``.
    """

    preset: str = option(
        "default", "default, or paper (as MatryoshkaKV was published).", partial(choice, known=tuple(PRESETS))
    )
    tokens: int = option(2**19, "Tokens to train on; texts are read again where they have fewer.", whole)
    length: int = option(1024, "Tokens per text.", whole)
    batch_size: int = option(4, "Texts per step, over all processes.", whole)
    learning_rate: float = option(
        None, f"Peak learning rate (AdamW). {DEFAULT}", partial(number, above=0), cli=float | None
    )
    basis: str = option(
        None, "Bases of the calibration, where no adapter is given.", partial(choice, known=(AUTO, *BASES)), cli=False
    )
    sampling: str = option(
        None, "See `nestling.kv.training.sampling.schedule`.", partial(choice, known=SAMPLINGS), cli=False
    )
    allocation: str = option(None, "Allocation of sampled and measured ranks: energy or uniform.", text, cli=False)
    kl_weight: float = option(None, "Weight of the distance to the full model.", partial(number, minimum=0), cli=False)
    ce_weight: float = option(None, "Weight of the loss on the text's tokens.", partial(number, minimum=0), cli=False)
    sinks: int = option(None, f"Leading tokens that the caches will keep exact. {DEFAULT}", natural, cli=int | None)
    window: int = option(
        None, f"Recent tokens that they will keep exact, at least. {DEFAULT}", natural, cli=int | None
    )
    budgets: Any = option(
        BUDGETS,
        "Shares such as 0.25, 25 or 25% at which held-out text is read.",
        _shares,
        cli=str,
    )
    eval_windows: int = option(4, "Windows of held-out text.", whole, cli=False)
    seed: int = option(
        0, "Seed of the order of texts, of the ranks and of labels.", partial(whole, minimum=0, maximum=2**32 - 1)
    )
    bf16: bool = option(False, "Compute in bf16; fast where the processor has it.", flag)
    gradient_checkpointing: bool = option(
        False, "Recompute activations: slower, less memory.", flag, flags=("--checkpointing",)
    )
    output_dir: Any = option("checkpoints", "Folder of checkpoints.", path, cli=False)
    resume: bool = option(False, "Go on from the last checkpoint.", flag)
    arguments: Any = option(None, "Others of transformers' TrainingArguments, by name.", _arguments, cli=False)
    progress: bool = option(True, "Show progress bars.", flag, cli=False)

    def __post_init__(self):
        super().__post_init__()
        for name, value in {**PRESETS[self.preset], "arguments": {}}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not (self.kl_weight or self.ce_weight):
            raise OptionError("kl_weight=0 and ce_weight=0: nothing is left to learn from")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The training of arXiv 2410.14731, with changes."""
        return cls(preset="paper", **changes)

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON values: a job's identity, and what an adapter tells of itself."""
        return {name: value for name, value in super().to_dict().items() if name not in NOT_ITS_IDENTITY}
