"""Quality of nested caches and of quantised ones, by bytes: KL, perplexity, agreement and multiple choice.

    python benchmarks/kv_quality.py --data FOLDER                        # everything; hours on two cores
    python benchmarks/kv_quality.py --data FOLDER --only kl              # the curves alone
    python benchmarks/kv_quality.py --data FOLDER --only tasks --task-budgets 0.75,0.5 --rows 100

Bases are calibrated on the Brown corpus, text is WikiText's valid articles, tasks are HellaSwag, PIQA, ARC (easy and
challenge), WinoGrande and CommonsenseQA. Without --data, help pages of Python that were not calibrated on, and no
tasks. All caches store bf16 or less, on a model that computes in its own dtype. A killed run goes on where it stopped;
rows of separate runs with the same settings meet in one results file.
"""

import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import partial as bind
from pathlib import Path

import baselines
import torch
import typer
from rich.console import Console

from nestling import kv
from nestling.data.texts import read_multiple_choice, read_texts
from nestling.data.windows import token_windows
from nestling.jobs.results import ResultStore
from nestling.kv import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.kv.integration.attach import text_config
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SEED = 0
PAPER = {"sinks": 0, "window": 0, "exact_prompt": False}
METHODS: dict[str, tuple[str, dict]] = {  # name: adapter (basis, and how its costs are measured), options of its cache
    "pca-uniform": ("pca", {"allocation": "uniform", **PAPER}),
    "balanced-uniform": ("balanced", {"allocation": "uniform", **PAPER}),
    "balanced-energy": ("balanced", {"allocation": "energy", **PAPER}),
    # With 4 sinks and 64 recent tokens exact, as by default.
    "pca-uniform-window": ("pca", {"allocation": "uniform", "exact_prompt": False}),
    "balanced-window": ("balanced-window", {"allocation": "energy", "exact_prompt": False}),
}
BASELINES = {
    "int8": bind(baselines.int_cache, bits=8),
    "int4": bind(baselines.int_cache, bits=4),
    "quanto-int4": bind(baselines.quanto_cache, bits=4),
}
ASKED = "Question: {}\nAnswer:"
TASKS = {  # name: file, prompt
    "hellaswag": ("mc/hellaswag_val.jsonl.gz", "{}"),
    "piqa": ("mc/piqa_valid.jsonl.gz", ASKED),
    "arc_easy": ("mc/arc_easy_test.jsonl.gz", ASKED),
    "winogrande": ("mc/winogrande_dev.jsonl.gz", "{}"),
    "arc_challenge": ("mc/arc_challenge_test.jsonl.gz", ASKED),
    "commonsenseqa": ("mc/commonsenseqa_dev.jsonl.gz", ASKED),
}


class Part(StrEnum):
    kl = "kl"
    tasks = "tasks"
    both = "both"


def shuffled(items: Iterable) -> list:
    return random.Random(SEED).sample(items := list(items), len(items))


def articles(paragraphs: Iterable[str]) -> Iterator[str]:
    """WikiText's articles, each from one `= Title =` to the next, paragraphs apart by a blank line."""
    article: list[str] = []
    for paragraph in paragraphs:
        if re.fullmatch(r"= [^=]+ =", paragraph) and article:
            yield "\n\n".join(article)
            article = []
        article.append(paragraph)
    if article:
        yield "\n\n".join(article)


def texts(data: Path | None) -> tuple[list[str], list[str]]:
    """Documents to calibrate on, and to measure on."""
    if data is not None:
        wiki = articles(read_texts(data / "lm/wikitext103_valid.detok.txt.gz"))
        return shuffled(read_texts(data / "lm/brown.jsonl.gz")), list(wiki)
    pages = shuffled(read_texts(None))
    return pages[::2], pages[1::2]


def spread_windows(tokenizer, documents: Iterable[str], length: int, count: int) -> torch.Tensor:
    """``count`` windows of ids ``[count, length]`` at even distances over the documents; all there are, if fewer."""
    windows = list(token_windows(tokenizer, documents, length))
    places = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long().tolist()
    return torch.stack([windows[place] for place in places])


def questions(data: Path, rows: int) -> dict[str, list[dict]]:
    found = {}
    for task, (file, prompt) in TASKS.items():
        chosen = shuffled(read_multiple_choice(data / file))[:rows]
        found[task] = [{**row, "question": prompt.format(row["question"])} for row in chosen]
    return found


def fit(model, tokenizer, name: str, documents: list[str], tokens: int, folder: Path | None) -> kv.KVAdapter:
    """Calibrate, for caches in which everything is compressed or for those with a window; or read what was calibrated
    before into ``folder``."""
    place = None if folder is None else folder / f"{name}-{tokens}"
    if place is not None and place.is_dir():
        return kv.KVAdapter.from_pretrained(place)
    basis, exact = name.removesuffix("-window"), {} if name.endswith("-window") else {"sinks": 0, "window": 0}
    adapter = kv.fit(model, tokenizer, documents, kv.FitConfig(basis=basis, tokens=tokens, **exact))
    if place is not None:
        adapter.save_pretrained(place)
    return adapter


def candidates(lm, adapters: dict[str, kv.KVAdapter], methods: list[str], sizes: list[float], context: int) -> list:
    found = []
    for name in methods:
        if name in BASELINES:
            found.append(Candidate(name, None, bind(BASELINES[name], text_config(lm))))
            continue
        basis, options = METHODS[name]
        make = baselines.nested(lm, adapters[basis], quantise=False, context=context, dtype=torch.bfloat16, **options)
        found += [Candidate(name, size, bind(make, size)) for size in sizes]
    return found


def merged(old: Iterable[dict], new: Iterable[dict], methods: Iterable[str] = (*METHODS, *BASELINES)) -> list[dict]:
    """Rows joined by model, method and budget: what is newer and not missing counts. By model, in the order of
    ``methods``; one with a name of its own behind it, ``bits-NAME``, stands where the method does."""
    rows: dict[tuple, dict] = {}
    for row in (*old, *new):
        key = row["model"], row["method"], row["budget"]
        rows[key] = rows.get(key, {}) | {k: v for k, v in row.items() if v is not None or k not in rows.get(key, {})}
    order, models = ["full", *methods], list(dict.fromkeys(row["model"] for row in rows.values()))

    def place(row: dict) -> tuple:
        method = row["method"] if row["method"] in order else row["method"].partition("-")[0]
        return models.index(row["model"]), order.index(method), row["method"], -(row["budget"] or 0)

    return sorted(rows.values(), key=place)


def of_bf16(rows: list[dict]) -> None:
    """Have the full cache's row say what it takes in bf16, of which all shares are, whatever the model computes in."""
    for row in rows:
        if row["method"] == "full" and row.get("bytes_share"):
            row.update(bytes_share=1.0, bytes_per_token=row["bytes_per_token"] / row["bytes_share"])


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part.strip()]


def main(
    data: Path | None = typer.Option(None, help="Folder with lm/ and mc/; the built-in text and no tasks without it."),
    model: str = typer.Option("smollm2", help="Model: alias, folder, GGUF file or hub id."),
    windows: int = typer.Option(8, help="Windows of text."),
    length: int = typer.Option(1024, help="Tokens a window."),
    chunk: int = typer.Option(64, help="Tokens that go through a cache at once."),
    rows: int = typer.Option(200, help="Questions a task."),
    budgets: str = typer.Option("1,0.875,0.75,0.625,0.5,0.4,0.375,0.25", help="Shares of the full cache."),
    task_budgets: str | None = typer.Option(None, help="Those on which tasks are run; by default all."),
    methods: str = typer.Option(",".join([*METHODS, *BASELINES]), help="What is measured."),
    passkey: str = typer.Option("", help="Prompt lengths for hidden passkeys, with the tasks."),
    tokens: int = typer.Option(65536, help="Tokens to calibrate on."),
    adapters: Path | None = typer.Option(None, help="Folder that keeps calibrations for the next time."),
    only: Part = typer.Option(Part.both, help="KL, perplexity and agreement, or the tasks."),
    out: Path = typer.Option(Path("benchmarks/results/kv_quality.json"), help="Results; joined with what is there."),
):
    start, chosen = time.monotonic(), methods.split(",")
    if unknown := set(chosen) - {*METHODS, *BASELINES}:
        raise typer.BadParameter(f"unknown methods {sorted(unknown)}; known: {', '.join([*METHODS, *BASELINES])}")
    measured, calibrated = ("wikitext103", "brown") if data else ("built-in", "built-in")
    settings = {"model": Path(model).name, "text": measured, "calibrated_on": calibrated, "tokens": tokens}
    settings |= {"length": length, "storage": "bf16", "seed": SEED}
    old = {"rows": [], "meta": {"settings": settings, "runs": []}}
    if out.exists():
        old = json.loads(out.read_text("utf-8"))
    if (theirs := old["meta"].get("settings")) != settings:
        raise typer.BadParameter(f"{out.name} has other settings, {theirs} and not {settings}: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    side_file = out.with_suffix(".partial.json")
    store = ResultStore(side_file, settings)

    lm, tokenizer = load_model(model)
    calibration, documents = texts(data)
    bases = sorted({METHODS[name][0] for name in chosen if name in METHODS})
    fitted = {basis: fit(lm, tokenizer, basis, calibration, tokens, adapters) for basis in bases}
    measure, config = bind(compare, lm, tokenizer, store=store), bind(EvalConfig, chunk=chunk, length=length)
    found, run = old["rows"], {"part": only.value, "chunk": chunk}
    if only != Part.tasks:
        ids = spread_windows(tokenizer, documents, length, windows)
        run["windows"] = len(ids)
        entrants = candidates(lm, fitted, chosen, numbers(budgets), length)
        found = merged(found, measure(ids, entrants, config(windows=len(ids))))
    if only != Part.kl and (data is not None or passkey):
        tasks = {} if data is None else questions(data, rows)
        run["rows"] = rows
        entrants = candidates(lm, fitted, chosen, numbers(task_budgets or budgets), length)
        new = measure(None, entrants, config(windows=0, tasks=tasks, passkey=[int(n) for n in numbers(passkey)]))
        found = merged(found, [{k: v for k, v in row.items() if not k.startswith("bytes_")} for row in new])
    of_bf16(found)
    meta = run_meta(time.monotonic() - start)
    run |= {k: meta[k] for k in ("command", "date", "commit", "seconds")}
    write_json(out, found, {**meta, "settings": settings, "runs": [*old["meta"]["runs"], run]})
    side_file.unlink(missing_ok=True)
    console = Console()
    console.width = max(console.width, 180)  # a table cut to 80 columns says nothing, least of all in a log
    console.print(table([{k: v for k, v in row.items() if k != "model"} for row in found]))
    console.print(f"written to {out.name}")


if __name__ == "__main__":
    typer.run(main)
