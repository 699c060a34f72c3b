"""Fine-tuning on GSM8K with a compressed cache: LoRA first, then LoRA and bases together, as in the paper's section 4.

    python benchmarks/kv_sft.py --data FOLDER --work FOLDER [--adapter smollm2] [--examples 600] [--questions 50]

Stage one is plain LoRA at full rank, stage two trains LoRA weights and rotations on the answers under sampled ranks,
without a teacher. Rows: exact match and perplexity of the reference answers, by budget, after each stage. Everything
is compressed from the first token on: questions and answers are hardly longer than an exact window. Killed, the same
command goes on after the last whole stage, and inside of the second one from its last checkpoint.
"""

import gzip
import json
import math
import re
import time
from pathlib import Path

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from nestling import kv
from nestling.data.windows import answer_windows
from nestling.jobs.progress import progress_bar
from nestling.kv.integration.attach import attach, cached
from nestling.losses import IGNORED
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

ASKED = 25  # questions at a time
PROMPT = "Question: {}\nAnswer:"
TOGETHER = {"kl_weight": 0.0, "ce_weight": 1.0, "learning_rate": 5e-4, "sinks": 0, "window": 0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pairs(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(PROMPT.format(row["question"]), " " + row["answer"]) for row in rows]


def plain_lora(model, ids: torch.Tensor, labels: torch.Tensor, folder: Path, epochs: float, batch: int, lr: float):
    """Stage one: transformers' own loop and loss."""
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, num_train_epochs=epochs, learning_rate=lr,
        lr_scheduler_type="cosine", warmup_steps=20, logging_steps=10, save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip

    def collate(items):
        return {"input_ids": torch.stack([i for i, _ in items]), "labels": torch.stack([label for _, label in items])}

    Trainer(model, arguments, train_dataset=TensorDataset(ids, labels), data_collator=collate).train()


@torch.no_grad()
def measure(lm, tokenizer, adapter: kv.KVAdapter, budgets: list[float], tests: list[tuple[str, str]], ids, labels):
    """Rows of one stage: exact match over ``tests``, perplexity of the answers in ``ids`` and ``labels``."""
    lm.eval()
    rows = []
    with progress_bar() as bar:
        for budget in budgets:
            task, nll, counted, right = bar.add_task(f"{budget:.1%}", total=len(ids) + len(tests)), 0.0, 0, 0

            def cache(budget=budget):
                return kv.NestedCache(lm, adapter, kv.CacheConfig.paper(budget))

            for row, target in zip(ids, labels, strict=True):
                start, end = (target != IGNORED).nonzero()[[0, -1], 0].tolist()
                held, row, target = cache(), row.to(lm.device), target.to(lm.device)
                logits = lm(input_ids=row[None, :end], **cached(lm, held)).logits[0, start - 1 :]
                answer = target[start : end + 1]
                nll += float(cross_entropy(logits.float(), answer, reduction="sum"))
                counted += len(answer)
                bar.advance(task)
            for some in batched(tests, ASKED):
                inputs = tokenizer([q for q, _ in some], return_tensors="pt", padding=True, padding_side="left")
                inputs = inputs.to(lm.device)
                out = lm.generate(**inputs, **cached(lm, cache()), max_new_tokens=200, do_sample=False)
                given = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                found = [(number(text), number(answer)) for text, (_, answer) in zip(given, some, strict=True)]
                right += sum(ours is not None and ours == theirs for ours, theirs in found)
                bar.advance(task, len(some))
            rows.append({"budget": budget, "answer_ppl": math.exp(nll / counted), "acc_gsm8k": right / len(tests)})
    return rows


def batched(items: list, size: int):
    return [items[i : i + size] for i in range(0, len(items), size)]


def number(answer: str) -> str | None:
    found = re.search(r"####\s*(-?[\d,]+(?:\.\d+)?)", answer)
    return found and found[1].replace(",", "")


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    work: Path = typer.Option(..., help="Folder of checkpoints."),
    adapter: str = typer.Option("smollm2", help="Bases to start from: alias or folder."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    epochs: float = typer.Option(1.0, help="Of each stage."),
    examples: int | None = typer.Option(None, help="Questions to train on; by default all."),
    length: int = typer.Option(256, help="Tokens of question and answer; longer ones are left out."),
    batch: int = typer.Option(8, help="Texts a step."),
    questions: int = typer.Option(50, help="Questions for exact match."),
    answers: int = typer.Option(200, help="Answers for perplexity."),
    budgets: str = typer.Option("1,0.5,0.375", help="Shares of the full cache."),
    out: Path = typer.Option(Path("benchmarks/results/kv_sft.json")),
):
    start = time.monotonic()
    lm, tokenizer = load_model(model)
    if torch.cuda.is_available():
        lm = lm.cuda()
    ids, labels = answer_windows(tokenizer, pairs(data / "gen/gsm8k_train.jsonl.gz")[:examples], length)
    tests = pairs(data / "gen/gsm8k_test.jsonl.gz")
    held_ids, held_labels = answer_windows(tokenizer, tests[:answers], length)
    lora, second = work / "lora", work / "together"
    if lora.is_dir():
        tuned = PeftModel.from_pretrained(lm, lora, is_trainable=True)
    else:
        tuned = get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS))
        plain_lora(tuned, ids, labels, work / "steps", epochs, batch, 5e-4)
        tuned.save_pretrained(lora)
    bases, shares, rows = kv.KVAdapter.from_pretrained(adapter), [float(b) for b in budgets.split(",")], []

    def record(stage: str, current: kv.KVAdapter) -> None:
        measured = measure(lm, tokenizer, current, shares, tests[:questions], held_ids, held_labels)
        rows.extend({"model": Path(model).name, "method": stage, **row} for row in measured)

    attach(lm)
    record("lora", bases)
    config = kv.TrainConfig(
        output_dir=second, length=length, batch_size=batch, tokens=int(epochs * ids.numel()), resume=second.is_dir(),
        **TOGETHER,
    )  # fmt: skip
    together = kv.train(tuned, None, ids, bases, config, labels=labels)
    record("lora, then both", together)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, run_meta(time.monotonic() - start))
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
