"""lm-eval's harness under nested and KIVI caches: the paper's six tasks for SmolLM2, with few-shot examples.

    pip install 'nestling[lm-eval]'
    python benchmarks/kv_lm_eval.py --data DATA [--rows 40]

Questions are asked after so many solved ones that a text has about `CONTEXT` tokens, of which 68 to 83 are exact. The
examples are the same for all questions of a task, and none of them is asked. Answers are kept: a killed run goes on,
and a later one with more ``--rows`` adds to it.
"""

import json
import tempfile
import time
from functools import partial as bind
from itertools import product
from pathlib import Path

import baselines
import torch
import typer
from kv_quality import TASKS, shuffled
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from rich.console import Console

from nestling.data.texts import read_multiple_choice
from nestling.integrations.lm_eval import NestlingLM
from nestling.jobs.results import ResultStore
from nestling.kv.evaluation.tasks import BLANK, held_bytes
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SHOTS = {"hellaswag": 5, "piqa": 12, "arc_easy": 14, "winogrande": 16, "arc_challenge": 12, "commonsenseqa": 18}
CONTEXT = 512  # tokens at which budgets are met
BLOCK = 10  # questions between two times that results are kept
RIVALS = {f"kivi-int{bits}": bind(baselines.kivi_cache, bits=bits) for bits in (4, 2)}
YAML = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/{task}.shots.jsonl, test: {folder}/{task}.jsonl}}
  cache_dir: {folder}/cache
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
doc_to_text: {text}
doc_to_target: {target}
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class Rival(NestlingLM):
    """The same harness for another cache."""

    def __init__(self, rival: str, *args, **options):
        self.rival = rival
        super().__init__(*args, **options)

    def make_cache(self):
        return RIVALS[self.rival](self.model.config)

    def cache_bytes(self, cache):
        batch = cache.layers[0].parts[0][0].shape[0]
        return held_bytes(cache), 2 * self.adapter.full_elements * cache.get_seq_length() * batch


def write_tasks(data: Path, folder: Path, rows: int) -> None:
    """Task files of lm-eval, with ``rows`` questions each and the examples before them."""
    for task, (file, prompt) in TASKS.items():
        questions = shuffled(read_multiple_choice(data / file))
        filled = task == "winogrande"  # each choice makes a context of its own, and the same words follow
        text, target = ("answer", "rest") if filled else ('"{{question}}"', "answer")
        yaml = YAML.format(task=task, folder=folder, shots=SHOTS[task], text=text, target=target)
        (folder / f"{task}.yaml").write_text(yaml, "utf-8")
        for name, part in ((task, questions[:rows]), (f"{task}.shots", questions[-SHOTS[task] :])):
            lines = [json.dumps(in_blank(row) if filled else asked(row, prompt)) for row in part]
            (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")


def asked(row: dict, prompt: str) -> dict:
    return {"question": prompt.format(row["question"]), "choices": row["choices"], "answer": row["answer"]}


def in_blank(row: dict) -> dict:
    before, after = BLANK.split(row["question"])
    return {"choices": [before + choice for choice in row["choices"]], "rest": after.strip(), "answer": row["answer"]}


def answer(sample: dict) -> list[int]:
    """The choice that is likeliest for its length, and whether it is right."""
    choices, target = sample["doc"]["choices"], sample["doc"]["answer"]
    alike = len({rest for _, rest in sample["arguments"]}) == 1
    lengths = [1 if alike else len(choice) for choice in choices]
    scores = [total / length for (total, _), length in zip(sample["filtered_resps"], lengths, strict=True)]
    chosen = scores.index(max(scores))
    return [chosen, int(chosen == target)]


def measure(lm: NestlingLM, name: str, tasks: dict, numbers: range, store: ResultStore) -> None:
    """Ask what has not been asked of one task's questions."""
    [task] = tasks
    todo = [n for n in numbers if f"{name} | {task} | {n}" not in store.done]
    if todo:
        lm.reads.clear()
        found = evaluate(lm=lm, task_dict=tasks, samples={task: todo}, bootstrap_iters=0)
        held = [sum(column) / len(lm.reads) for column in zip(*lm.reads, strict=True)]
        for number, sample in zip(todo, sorted(found["samples"][task], key=lambda s: s["doc_id"]), strict=True):
            store.done[f"{name} | {task} | {number}"] = [*answer(sample), *held]
        store.save()


def summary(names: list[str], store: ResultStore) -> list[dict]:
    """A row a method: accuracy by task, agreement with the first method's choices, share of bytes held."""
    rows = []
    for name in names:
        numbers = {key: store.numbers(key, 5) for key in store.done if key.startswith(f"{name} | ")}
        first = [store.done.get(key.replace(name, names[0], 1)) for key in numbers]
        same = [mine[0] == theirs[0] for mine, theirs in zip(numbers.values(), first, strict=True) if theirs]
        row: dict = {"method": name, "questions": len(numbers)}
        for task in TASKS:
            right = [value[1] for key, value in numbers.items() if key.split(" | ")[1] == task]
            row[f"acc_{task}"] = sum(right) / len(right) if right else None
        measured = [row[f"acc_{task}"] for task in TASKS if row[f"acc_{task}"] is not None]
        row["mean"] = sum(measured) / len(measured) if measured else None
        row["agreement"] = sum(same) / len(same) if same else None
        row["tokens"], held, full = (sum(v[i] for v in numbers.values()) / max(len(numbers), 1) for i in (2, 3, 4))
        rows.append({**row, "bytes_share": held / full if full else None})
    return rows


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("smollm2", help="Alias or folder."),
    adapter: str = typer.Option("smollm2", help="The adapter."),
    budgets: str = typer.Option("1,0.5,0.25,0.125", help="Shares of the full cache."),
    rivals: str = typer.Option(",".join(RIVALS), help="Other caches."),
    tasks: str = typer.Option(",".join(TASKS), help="What is asked."),
    rows: int = typer.Option(40, help="Questions a task."),
    out: Path = typer.Option(Path("benchmarks/results/kv_lm_eval.json"), help="Results; answers are kept beside it."),
):
    start = time.monotonic()
    store = ResultStore(
        out.with_suffix(".answers.json"), {"model": Path(model).name, "shots": SHOTS, "context": CONTEXT}
    )
    lm, tokenizer = load_model(model, torch.float32)
    common = {"tokenizer": tokenizer, "device": "cpu"}
    harness: dict[str, NestlingLM] = {
        f"nestling at {float(budget):g}": NestlingLM(lm, adapter, budget=float(budget), context=CONTEXT, **common)
        for budget in budgets.split(",")
    }
    harness |= {name: Rival(name, lm, adapter, **common) for name in rivals.split(",") if name}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(data, Path(folder), rows)
        manager = TaskManager(include_path=folder, include_defaults=False)
        task_dicts = [get_task_dict([task], manager) for task in tasks.split(",")]
        for first in range(0, rows, BLOCK):
            for task_dict, (name, harnessed) in product(task_dicts, harness.items()):
                measure(harnessed, name, task_dict, range(first, min(first + BLOCK, rows)), store)
            write_json(out, summary(list(harness), store), {**run_meta(time.monotonic() - start), "rows": rows})
    console = Console()
    console.width = max(console.width, 180)
    console.print(table(summary(list(harness), store)))


if __name__ == "__main__":
    typer.run(main)
