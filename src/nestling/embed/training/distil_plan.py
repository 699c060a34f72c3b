"""What is distilled on what: options that go together, texts that are left, who is followed, what is measured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from nestling.embed.evaluation.agreement import AgreementEvaluator
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.fingerprint import checksum, fingerprint, reading
from nestling.embed.model.parts import Encoder
from nestling.embed.model.similarity import Similarity
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.data import Examples
from nestling.embed.training.exclude import without
from nestling.embed.training.held_out import held_out
from nestling.embed.training.job import ladder_of, teacher_of
from nestling.errors import ExampleError, OptionError, UnsupportedEncoderError
from nestling.jobs.processes import processes

OTHERS = ("cascade", "normalize", "mini_batch_size", "projection", "dropout", "gradient_checkpointing", "callbacks",
          "arguments")  # fmt: skip
BATCH = 64


@dataclass(frozen=True)
class Distillation:
    """What is distilled on what, and how; see `distil`."""

    encoder: Encoder
    texts: list[str]
    left_out: dict[str, int]
    small: Ladder
    sizes: Ladder
    config: TrainConfig
    teacher: SentenceTransformer | None
    prompts: tuple[str, str]
    measure: Any

    @property
    def batch(self) -> int:
        """Texts a step."""
        return min(BATCH, len(self.texts)) if self.config.batch_size is None else self.config.batch_size

    @property
    def steps(self) -> int:
        """Steps of the optimiser, if time does not end them."""
        if self.config.steps is not None:
            return self.config.steps
        epochs = 1.0 if self.config.epochs is None else self.config.epochs
        return max(1, round(epochs * len(self.texts) / self.batch))

    @property
    def guide(self) -> SentenceTransformer:
        """Who is followed."""
        return self.teacher or self.encoder.model

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which layers run in bf16, if they should."""
        kind = self.encoder.model.device.type
        return torch.autocast(kind, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()

    def identity(self) -> dict[str, Any]:
        """What a resumed training must agree on."""
        model = self.encoder.model
        return {
            **self.config.identity(), "model": fingerprint(model), **reading(model), "sizes": str(self.sizes),
            "rows": len(self.texts), "data": checksum(self.texts), "teacher": checksum(self.guide),
            "prompts": self.prompts, "exclude": None,
        }  # fmt: skip


def planned(
    model: SentenceTransformer, examples: Examples, sizes: Any, config: TrainConfig, teacher: Any, evaluator: Any
) -> Distillation:
    """The job with all that follows from something else.

    Raises:
        OptionError, ExampleError, UnsupportedEncoderError, LadderError: what does not go together.
    """
    encoder = Encoder.of(model)
    ladder = ladder_of(encoder, sizes)
    small = [size for size in ladder if size.layers < ladder.full.layers]
    changed = [name for name in OTHERS if getattr(config, name) != getattr(TrainConfig(), name)]
    if changed:
        raise OptionError(f"{', '.join(changed)}: that is of training on pairs, and texts are distilled: leave it out")
    if config.resume and config.output_dir is None:
        raise OptionError("resume=True without output_dir: name the folder of the training that goes on")
    if processes() > 1:
        raise OptionError("texts are distilled in one process: start it without torchrun")
    if not small:
        raise OptionError(f"the sizes {ladder} are of the full depth alone: name some of fewer layers")
    if not Similarity.of(encoder.model).unit:
        raise UnsupportedEncoderError(
            f"the model compares by {Similarity.of(encoder.model).words}, in which lengths count, and texts are "
            'distilled for cosines: set model.similarity_fn_name = "cosine" if that is how it is used'
        )
    known = {size.name for size in small}
    if odd := [name for name in config.weights or () if name not in known]:
        raise OptionError(
            f"weights: {odd[0]} is none of the small sizes {', '.join(sorted(known))}, which are trained"
        )
    teacher = teacher_of(teacher, config.teacher_prompts)
    prompts = (_prompt(config.prompts, encoder.model), _prompt(
        config.prompts if teacher is None else config.teacher_prompts, teacher or encoder.model))  # fmt: skip
    examples = without(examples, config.exclude)
    if config.texts is not None and config.texts < len(examples):
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed))[: config.texts]
        column = examples.columns["text"]
        examples = replace(examples, columns={"text": [column[row] for row in chosen.sort().values.tolist()]})
    kept = None
    if evaluator is None:
        examples, kept = held_out(examples, config.held_out)
    elif not isinstance(evaluator, GridEvaluator | AgreementEvaluator):
        raise OptionError(
            f"evaluator={type(evaluator).__name__}: it measures the full model, which stays as it is; give a "
            "GridEvaluator, which measures every size"
        )
    bf16 = _has_bf16(encoder.model.device.type) if config.bf16 is None else config.bf16
    config = replace(config, bf16=bf16)
    plan = Distillation(encoder, examples.columns["text"], examples.left_out, Ladder(small), ladder, config, teacher,
                        prompts, evaluator)  # fmt: skip
    if len(plan.texts) < 2 or not 2 <= plan.batch <= len(plan.texts):
        raise ExampleError(
            f"batch_size={plan.batch} does not fit {len(plan.texts)} texts: a step compares some of them, two at least"
        )
    if kept is not None:
        texts = kept.columns["text"]
        vectors = plan.guide.encode(texts, prompt=prompts[1], convert_to_tensor=True, show_progress_bar=False)
        unit = torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)
        plan = replace(plan, measure=AgreementEvaluator(texts, unit, prompt=prompts[0]))
    return plan


def _prompt(asked: Any, model: SentenceTransformer) -> str:
    """The prompt of texts: the one asked for, or the one that ``encode`` uses by itself."""
    if isinstance(asked, str):
        return asked
    if asked and set(asked) != {"text"}:
        raise OptionError(f"there are no columns {sorted(set(asked) - {'text'})} to prompt: expected text")
    return (asked or {}).get("text", stored_prompts(model)["sts"])


def _has_bf16(kind: str) -> bool:
    """Whether bf16 is fast there."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return kind == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
