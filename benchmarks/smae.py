"""What pre-training is worth: STS and retrieval of every cup after the same fine-tuning, with and without it.

    python benchmarks/smae.py --data FOLDER --work FOLDER --text FILE [--text FILE] [--start FOLDER] [--arms srl]

Arms: `srl` fine-tunes the start as it is; `mlm-srl` after plain masked-language modelling of the same windows (the
control); `smae-srl` after SMAE as published, all sizes in every step; `smae-some-srl` after SMAE with two sizes a
step; `smae-separate` after SMAE, a model for each size by itself. Without --start it is a ModernBERT (--kind bert for
a BERT) with random weights (--layers x --dims) and a tokenizer that was trained on the text. Every training
has a process of its own. Arms in the results file are not run again; a pre-training that was killed goes on at its
last checkpoint.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from embed_data import dev_set, triplets
from embed_quality import measured
from embed_rivals import Job, Sized, apart, full, separate, srl
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModel

from nestling import embed
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.folder import read
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.parts import Encoder
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

KINDS: dict[str, dict[str, Any]] = {
    "mlm": {"decoder": False},
    "smae": {"sizes_per_step": 0},
    "smae-some": {"sizes_per_step": 2},
}
ARMS = ("srl", "mlm-srl", "smae-srl", "smae-separate", "smae-some-srl")
ASKED = "srl,mlm-srl,smae-srl,smae-separate"
WIDENED = {"bert": 4, "modernbert": 2}  # feed-forward layers over the width; the latter has two of them, one a gate


@dataclass(frozen=True)
class Study:
    """A fine-tuning, and the pre-trainings before it."""

    job: Job  # from the start
    texts: list[str]
    steps: int
    batch: int
    length: int
    learning_rate: float

    def pretrained(self, kind: str) -> Path:
        """The folder of a pre-training, one of `KINDS`; not run again where it is there."""
        folder = self.job.work / f"{kind}-{self.steps}"
        if not folder.is_dir():
            apart(_pretrain, self, kind, folder)
        return folder


def _pretrain(study: Study, kind: str, folder: Path) -> None:
    job = study.job
    sizes = Ladder([job.ladder.full]) if kind == "mlm" else job.ladder
    config = embed.PretrainConfig(
        output_dir=folder, steps=study.steps, batch_size=study.batch, length=study.length,
        learning_rate=study.learning_rate, seed=job.seed, bf16=job.bf16,
        resume=Path(f"{folder}-checkpoints").is_dir(), **KINDS[kind],
    )  # fmt: skip
    encoder = embed.ElasticEncoder(load_encoder(job.model), sizes)
    encoder.pretrain(embed.Texts(study.texts, layout="documents"), config)


def arm(name: str, study: Study, data: Path, label: str) -> list[dict]:
    """Rows of one arm, with what its pre-training took."""
    job, taken = replace(study.job, work=study.job.work / name), {"pretrain_steps": 0}
    if name != "srl":
        folder = study.pretrained(name.rpartition("-")[0])
        job = replace(job, model=str(folder), work=study.job.work / f"{name}-{study.steps}-tuned")
        info = (read(folder) or {})["pretraining"]
        taken = {"pretrain_steps": study.steps, "pretrain_tokens": info["tokens"],
                 "pretrain_minutes": info["seconds"] / 60}  # fmt: skip
    job.begin()
    return [{**row, **taken} for sized in _tuned(name, job) for row in apart(measured, sized, name, job, data, label)]


def _tuned(name: str, job: Job) -> list[Sized]:
    if not name.endswith("separate"):
        return srl(job)
    return [*separate(job), *(replace(sized, ladder=Ladder([job.ladder.full])) for sized in full(job))]


def random_start(
    folder: Path,
    layers: int,
    dims: int,
    tokenizer: str,
    seed: int,
    texts: list[str] | None = None,
    vocabulary: int = 0,
    kind: str = "bert",
) -> Path:
    """A sentence encoder that has learned nothing: a BERT or ModernBERT of that shape, mean pooling.

    Its tokenizer is the one of that encoder, or one of the same kind with so many words of the texts.
    """
    if folder.is_dir():
        return folder
    words = load_encoder(tokenizer).tokenizer
    if texts:
        words = words.train_new_from_iterator(iter(embed.Texts(texts, layout="documents")), vocabulary)
    torch.manual_seed(seed)
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), hidden_size=dims, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None,
        num_attention_heads=max(1, dims // 64), intermediate_size=WIDENED[kind] * dims, **special,
    )  # fmt: skip
    plain = folder.with_name(f"{folder.name}-backbone")
    AutoModel.from_config(config).save_pretrained(plain)
    words.save_pretrained(plain)
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(dims, "mean")]).save_pretrained(str(folder))
    return folder


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    work: Path = typer.Option(..., help="Folder of trained models."),
    text: list[str] = typer.Option(..., help="What is pre-trained on; may be repeated."),
    start: str | None = typer.Option(None, help="Folder, hub id or alias; without, random weights."),
    layers: int = typer.Option(6, help="Of a random start."),
    dims: int = typer.Option(256, help="Of a random start."),
    kind: str = typer.Option("modernbert", help="Of a random start: modernbert or bert."),
    tokenizer: str = typer.Option("minilm", help="Encoder whose kind of tokenizer a random start has."),
    vocabulary: int = typer.Option(8192, help="Words of that tokenizer, from the text."),
    ladder: str = typer.Option("", help="The sizes; by default those for the shape of the start."),
    arms: str = typer.Option(ASKED, help=f"Some of {', '.join(ARMS)}."),
    pretrain_steps: str = typer.Option(
        "1000", help="Of pre-trainings; several, with commas, for a curve over tokens."
    ),
    pretrain_batch: int = typer.Option(64, help="Windows a step."),
    length: int = typer.Option(128, help="Tokens of a window."),
    pretrain_rate: float = typer.Option(1e-4, help="Learning rate of pre-trainings."),
    steps: int = typer.Option(300, help="Of fine-tuning."),
    batch: int = typer.Option(64, help="Rows a step of fine-tuning."),
    learning_rate: float = typer.Option(1e-4, help="Of fine-tuning."),
    seed: int = typer.Option(0, help="Of everything; run again with others for error bars."),
    bf16: bool = typer.Option(False, help="Train under autocast and measure in bf16."),
    name: str | None = typer.Option(None, help="Of the start, in the results."),
    out: Path = typer.Option(Path("benchmarks/results/smae.json"), help="Joined with what is there."),
):
    label = name or (Path(start).name if start else f"random-{kind}-{layers}x{dims}")
    place = work / f"{label}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    model = start or str(random_start(place / "start", layers, dims, tokenizer, seed, text, vocabulary, kind))
    encoder = load_encoder(model)
    parts = Encoder.of(encoder)
    cups = Ladder.parse(ladder) if ladder else Ladder.default(parts.depth, parts.dims)
    rows = triplets(data, steps * batch, seed, stored_prompts(encoder))
    job = Job(model, cups, rows, dev_set(data), place, steps, batch, learning_rate, seed, bf16=bf16)
    settings = {"ladder": str(cups), "steps": steps, "batch": batch, "learning_rate": learning_rate, "length": length,
                "pretrain_batch": pretrain_batch, "pretrain_rate": pretrain_rate,
                "bf16": bf16, "text": [Path(t).name for t in text]}  # fmt: skip
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"settings": {}}}
    known = old["meta"]["settings"].setdefault(label, settings)
    if known != settings:
        raise typer.BadParameter(f"{out.name} has other settings for {label}, {known} and not {settings}")
    found = old["rows"]
    for number in [int(n) for n in pretrain_steps.split(",")]:
        study = Study(job, text, number, pretrain_batch, length, pretrain_rate)
        for chosen in arms.split(","):
            if chosen not in ARMS:
                raise typer.BadParameter(f"{chosen!r} is no arm: choose some of {', '.join(ARMS)}")
            key = {"model": label, "method": chosen, "seed": seed, "pretrain_steps": 0 if chosen == "srl" else number}
            if any(all(row.get(k) == v for k, v in key.items()) for row in found):
                continue
            began = time.monotonic()
            found += arm(chosen, study, data, label)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, found, {**run_meta(time.monotonic() - began), "settings": old["meta"]["settings"]})
    columns = ("model", "method", "seed", "pretrain_steps", "pretrain_tokens", "pretrain_minutes", "size", "mean_sts",
               "mean_ndcg", "minutes")  # fmt: skip
    Console().print(table([{key: row.get(key) for key in columns} for row in found]))


if __name__ == "__main__":
    typer.run(main)
