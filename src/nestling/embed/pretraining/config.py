"""How an encoder is pre-trained: each option once, with its default, its line of help and its check."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nestling.config import Config, option
from nestling.errors import MaskingError
from nestling.options import by_name, flag, number, path, share, whole

# Options that leave the result as it is, so that a pre-training can be resumed with others.
FREE = ("output_dir", "skip_bad", "resume", "progress", "callbacks", "arguments")


_arguments = partial(by_name, owner="transformers' TrainingArguments")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Options of a pre-training. Two sizes a step are better than all of them, and faster.

    Attributes:
        output_dir: folder of the result, which must not exist; checkpoints go beside it, into
            ``<output_dir>-checkpoints``.
        batch_size: windows of text a step, over all processes and accumulation steps.
        encoder_ratio, decoder_ratio: whole words are masked; the encoder's are among the decoder's.
        decoder: without one it is masked-language modelling at every size, and with the full size alone the plain one.
        sizes_per_step: the full one is always among them, the others are drawn anew for each step.
        learning_rate: it falls to zero as a cosine, after a rise over the share ``warmup`` of the steps.
        callbacks: of transformers, as objects or classes. Those that say their state go on with it when a pre-training
            is resumed.
        arguments: further TrainingArguments by name, ``logging_steps, gradient_accumulation_steps, weight_decay,
            dataloader_num_workers, ...``; not those that have a field here.

    Raises:
        MaskingError: the encoder's share is above the decoder's.
    """

    output_dir: Path | None = option(None, "Folder of the result.", path, cli=False)
    steps: int = option(1000, "Steps of the optimiser.", whole)
    batch_size: int = option(64, "Windows of text a step, over all processes.", whole)
    length: int | None = option(None, "Tokens of a window; default: the model's, 512 at most.", whole)
    encoder_ratio: float = option(0.2, "Share of the tokens that the encoder predicts.", share)
    decoder_ratio: float = option(0.4, "Share of the tokens that the decoder predicts.", share)
    decoder: bool = option(True, "Rebuild texts from sentence vectors; without: masked words alone.", flag)
    sizes_per_step: int = option(
        2, "Sizes trained in a step, the full one among them; 0: all, as published.", partial(whole, minimum=0)
    )
    learning_rate: float = option(1e-4, "Peak learning rate (AdamW).", partial(number, above=0))
    warmup: float = option(
        0.05, "Share of the steps in which the learning rate rises.", partial(number, minimum=0, below=1)
    )
    dropout: bool = option(True, "Whether the model's dropout is on.", flag, cli=False)
    skip_bad: bool = option(False, "Leave out bad lines of files, and count them.", flag)
    seed: int = option(
        0, "Seed of the order of texts, masks and dropout.", partial(whole, minimum=0, maximum=2**32 - 1)
    )
    bf16: bool = option(False, "Compute in bf16; fast where the processor has it.", flag)
    save_steps: int | None = option(None, "Steps between checkpoints; default: a tenth.", whole)
    resume: bool = option(False, "Go on from the last checkpoint.", flag)
    progress: bool = option(True, "Show a progress bar.", flag, cli=False)
    callbacks: Any = option((), "Callbacks of transformers.", cli=False)
    arguments: Mapping[str, Any] | None = option(None, "Further training arguments.", _arguments, cli=False)

    def __post_init__(self):
        super().__post_init__()
        if not self.encoder_ratio <= self.decoder_ratio < 1:
            raise MaskingError(
                f"encoder_ratio={self.encoder_ratio:g} and decoder_ratio={self.decoder_ratio:g}: expected 0 < "
                "encoder_ratio <= decoder_ratio < 1"
            )

    @classmethod
    def paper(cls, **changes: Any) -> "PretrainConfig":
        """SMAE as it was published (arXiv 2410.13230): all sizes in every step."""
        return cls(**{"sizes_per_step": 0, **changes})

    def identity(self) -> dict[str, Any]:
        """The options that the result depends on: what a pre-training that is resumed must agree on."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE}
