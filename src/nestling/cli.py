"""The command line: ``nestling kv fit|eval|generate|inspect`` and ``nestling demo``.

Commands only parse, call the library and print. Heavy imports happen inside them, so that ``--help`` is quick.
"""

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="One model, every size.")
kv_app = typer.Typer(no_args_is_help=True, help="Nested KV caches: fit, eval, generate, inspect.")
demo_app = typer.Typer(no_args_is_help=True, help="End to end on a small real model, without the hub.")
app.add_typer(kv_app, name="kv")
app.add_typer(demo_app, name="demo")
console = Console()

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or the alias smollm2.", metavar="MODEL")]
Adapter = Annotated[str, typer.Argument(help="Folder or hub id of an adapter.", metavar="ADAPTER")]
Text = Annotated[
    str | None, typer.Option(help=".txt or .jsonl file (or .gz), or a datasets name; default: built-in English pages.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write {rows, meta} to this file.")]
Allocation = Annotated[str, typer.Option(help="energy or uniform.")]
Budget = Annotated[float, typer.Option(help="Share of the full cache's bytes, in (0, 1].")]
CacheDtype = Annotated[str, typer.Option(help="Precision of the stored cache: bfloat16, float16, float32 or model.")]


def errors_as_messages(command: Callable) -> Callable:
    """Expected errors (bad input, missing files) end the command with one line, not with a traceback."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error

    return run


@kv_app.command()
@errors_as_messages
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    text: Text = None,
    basis: Annotated[str, typer.Option(help="balanced, or pca (the paper's baseline).")] = "balanced",
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 65536,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    json: Json = None,
) -> None:
    """Calibrate nested bases for MODEL on text, without training, and save them as an adapter."""
    from nestling import kv
    from nestling.data import read_texts
    from nestling.models import load_model

    _check_folder(out)
    _check_folder(json)
    texts = read_texts(text)
    language_model, tokenizer = _loading(load_model, model)
    start = time.perf_counter()
    adapter = kv.fit(language_model, tokenizer, texts, basis, tokens=tokens, length=length)
    seconds = time.perf_counter() - start
    adapter.save_pretrained(out)
    layers, heads, width = adapter.shape
    used = adapter.info["tokens"]
    console.print(
        f"{layers} layers x {heads} KV heads of width {width}, {used:,} tokens in {seconds:.0f} s "
        f"({used / seconds:.0f} tokens/s), worst condition number {adapter.info['condition']:.1f}. Saved to {out}"
    )
    _write(json, [{"model": model, "seconds": seconds, **adapter.info}], seconds)


@kv_app.command("eval")
@errors_as_messages
def evaluate(
    model: Model,
    adapter: Adapter,
    budgets: Annotated[str, typer.Option(help="Shares or percents, separated by commas.")] = "100,75,50,40",
    allocation: Allocation = "energy",
    text: Text = None,
    windows: Annotated[int, typer.Option(help="Windows of text to read.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    chunk: Annotated[int, typer.Option(help="Tokens that go through the cache at once.")] = 64,
    task: Annotated[list[Path] | None, typer.Option(help="Multiple-choice .jsonl; may be repeated.")] = None,
    rows: Annotated[int | None, typer.Option(help="Questions per task.")] = None,
    passkey: Annotated[
        list[int] | None, typer.Option(help="Prompt length of a passkey test; may be repeated.")
    ] = None,
    sinks: Annotated[int, typer.Option(help="Leading tokens kept exact.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens kept exact.")] = 64,
    cache_dtype: CacheDtype = "bfloat16",
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write a report page to this file.")] = None,
) -> None:
    """Measure what budgets cost: KL to the full model, perplexity, top-1 agreement, tasks, bytes."""
    from nestling import kv
    from nestling.data import read_multiple_choice, read_texts
    from nestling.models import load_model

    shares = parse_budgets(budgets)
    _check_folder(json)
    _check_folder(html)
    nested = kv.KVAdapter.from_pretrained(adapter)
    tasks = {path.name.split(".")[0]: read_multiple_choice(path)[:rows] for path in task or []}
    texts = read_texts(text)
    language_model, tokenizer = _loading(load_model, model)
    start = time.perf_counter()
    result = kv.evaluate(
        language_model, tokenizer, nested, shares, allocation=allocation, texts=texts, windows=windows, length=length,
        chunk=chunk, tasks=tasks, passkey=passkey or (), sinks=sinks, window=window, dtype=_dtype(cache_dtype),
    )  # fmt: skip
    _show(result, f"{model}, {windows} windows of {length} tokens")
    _write(json, result, time.perf_counter() - start)
    if html is not None:
        from nestling.kv.demo import write_report

        write_report(html, nested, result, shares, title=f"{model}: quality and bytes")
        console.print(f"Report: {html}")


@kv_app.command()
@errors_as_messages
def generate(
    model: Model,
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(help="The prompt; - reads standard input.")],
    budget: Budget = 0.5,
    allocation: Allocation = "energy",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    sinks: Annotated[int, typer.Option(help="Leading tokens kept exact.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens kept exact.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    cache_dtype: CacheDtype = "bfloat16",
) -> None:
    """Generate from a compressed cache, as a stream, and say what the cache took."""
    from nestling import kv
    from nestling.kv.demo import stream
    from nestling.models import load_model

    nested = kv.KVAdapter.from_pretrained(adapter)
    language_model, tokenizer = _loading(load_model, model)
    cache = nested.cache(
        language_model, budget, allocation=allocation, sinks=sinks, window=window, dtype=_dtype(cache_dtype)
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    console.print(stream(language_model, tokenizer, text, cache, max_new_tokens, temperature), style="dim")


@kv_app.command()
@errors_as_messages
def inspect(
    adapter: Adapter,
    budget: Budget = 0.5,
    allocation: Allocation = "energy",
    json: Json = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat map of ranks to this file.")] = None,
) -> None:
    """Show the ranks of every layer and head at a budget, as a table and a heat map."""
    from rich.table import Table

    from nestling import kv
    from nestling.kv.demo import rank_maps, rank_rows, shade

    _check_folder(json)
    _check_folder(png)
    nested = kv.KVAdapter.from_pretrained(adapter)
    if not 0 < budget <= 1:
        raise kv.BudgetError(f"budget={budget:g} is out of range: a share of the full cache, above 0 and at most 1")
    ranks = nested.ranks(budget * nested.full_elements, allocation)
    rows = rank_rows(nested, ranks)
    width = nested.shape[2]
    table = Table("layer", "keys", "values", "groups", title=f"ranks of {width} at {budget:.4g} of the full cache")
    for row in rows:
        cells = ["".join(f"[on {shade(r / width)}] {r:3d} [/]" for r in row[side]) for side in ("keys", "values")]
        table.add_row(str(row["layer"]), *cells, str(row["groups"]))
    console.print(table)
    kept = {side: int(getattr(ranks, side).sum()) / (nested.full_elements / 2) for side in ("keys", "values")}
    share = ranks.elements / nested.full_elements
    console.print(
        f"{ranks.elements:,} of {nested.full_elements:,} elements per token ({share:.4f}); "
        f"keys keep {kept['keys']:.3f}, values {kept['values']:.3f}; {ranks.elements * 2:,} bytes per token in bf16"
    )
    _write(json, rows)
    if png is not None:
        rank_maps(nested, ranks, f"Ranks at {budget:.0%}").savefig(png, dpi=150)
        console.print(f"Heat map: {png}")


@demo_app.command("kv")
@errors_as_messages
def demo_kv(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or alias.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="The report to write.")] = Path("report.html"),
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 24576,
    json: Json = None,
) -> None:
    """Calibrate, tabulate budgets, answer one prompt at 100, 50 and 40 %, and write report.html."""
    from nestling.kv.demo import run

    _check_folder(out)
    _check_folder(json)
    start = time.perf_counter()
    rows = run(model, out, tokens, console)
    _write(json, rows, time.perf_counter() - start)


def parse_budgets(text: str) -> list[float]:
    """``"100,50%,0.4"`` to shares: numbers above 1 are percents."""
    shares = []
    for item in text.split(","):
        try:
            value = float(item.strip().removesuffix("%"))
        except ValueError:
            raise ValueError(f"budgets: {item.strip()!r} is not a number; expected something like 100,50,25") from None
        shares.append(value / 100 if value > 1 or item.strip().endswith("%") else value)
    return shares


def _dtype(name: str):
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "model": None}
    if name not in dtypes:
        raise ValueError(f"--cache-dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _loading(load: Callable, model: str) -> Any:
    with console.status(f"loading {model}"):
        return load(model)


def _show(rows: list[dict], title: str) -> None:
    from nestling.report import table

    console.print(table([{k: v for k, v in r.items() if k != "model"} for r in rows], title=title))


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist: make it first")


def _write(path: Path | None, rows: list[dict], seconds: float | None = None) -> None:
    if path is not None:
        from nestling.report import run_meta, write_json

        write_json(path, rows, run_meta(seconds))
        console.print(f"Results: {path}")
