"""The commands of the cache wing: ``nestling kv fit|train|search|eval|generate|serve|inspect``.

Commands only parse, call the library and print. Heavy imports happen inside them, so that ``--help`` is quick.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.data import TextSource
from nestling.cli.options import takes
from nestling.cli.terminal import (
    Json,
    Model,
    cache_adapter,
    check_checkpoints,
    check_outputs,
    console,
    errors_as_messages,
    loading,
    not_negative,
    positive,
    show,
    write_results,
)
from nestling.integrations.serve.config import ServeConfig
from nestling.jobs.processes import rank
from nestling.kv.cache.config import CacheConfig
from nestling.kv.calibration.config import FitConfig, SearchConfig
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.training.config import TrainConfig

kv_app = typer.Typer(
    no_args_is_help=True, help="Nested KV caches: fit, train, search, eval, generate, serve, inspect."
)

Adapter = Annotated[str, typer.Argument(help="Folder or hub id of an adapter.", metavar="ADAPTER")]
OwnAdapter = Annotated[
    str | None,
    typer.Argument(help="Folder or hub id of an adapter; default: that of the package.", metavar="ADAPTER"),
]
Budgets = Annotated[str, typer.Option(help="Shares such as 0.25, 25 or 25%, separated by commas.")]


def apart(texts: Iterable[str]) -> tuple[Iterator[str], Iterator[str]]:
    """Texts to learn from, and after these have been read: one in twenty of them, and what was left. A single text is
    both. A large corpus is read no farther than is needed."""
    rest = iter(texts)
    first = list(islice(rest, 2))
    if len(first) < 2:
        return iter(first), iter(first)
    aside = first[:1]

    def learned() -> Iterator[str]:
        for number, text in enumerate(chain(first[1:], rest), 1):
            if number % 20:
                yield text
            else:
                aside.append(text)

    return learned(), chain(aside, rest)


@kv_app.command()
@errors_as_messages
@takes(source=TextSource, config=FitConfig)
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    source: TextSource,
    config: FitConfig,
    json: Json = None,
) -> None:
    """Calibrate nested bases for MODEL on text, without training, measure their caches, and save them."""
    from nestling import kv
    from nestling.kv.adapter_config import basis_of
    from nestling.kv.adapter_files import check_place, expected_bytes
    from nestling.kv.evaluation.check import COLUMNS, checked
    from nestling.models import load_model
    from nestling.report.tables import table

    check_outputs(json, folder=out)
    check_place(out)
    texts, held_out = apart(source.read())
    language_model, tokenizer = loading(load_model, model)
    check_place(out, expected_bytes(language_model))
    start = time.perf_counter()
    adapter = checked(language_model, tokenizer, held_out, kv.fit(language_model, tokenizer, texts, config))
    seconds = time.perf_counter() - start
    adapter.save_pretrained(out)
    layers, heads, width = adapter.shape
    used = adapter.info["tokens"]
    console.print(
        f"{layers} layers x {heads} KV heads of width {width}, {used:,} tokens in {seconds:.0f} s "
        f"({used / seconds:.0f} tokens/s), worst condition number {adapter.info['condition']:.1f}. Saved to {out}"
    )
    console.print(f"Bases: {basis_of(adapter.info)}")
    if measured := adapter.info.get("measured"):
        title = f"{model}: caches on {measured['length']:,} held-out tokens"
        console.print(table(measured["rows"], {k: h for k, h in COLUMNS.items() if k in measured["rows"][0]}, title))
    write_results(json, [{"model": model, "seconds": seconds, **adapter.info}], seconds)


@kv_app.command()
@errors_as_messages
@takes(source=TextSource, config=TrainConfig)
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the adapter; checkpoints go beside it.")],
    source: TextSource,
    config: TrainConfig,
    adapter: Annotated[str | None, typer.Option(help="Adapter to start from; default: calibrate first.")] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Held-out text; default: one in twenty of the texts that are trained on.")
    ] = None,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write the training curve to this page.")] = None,
) -> None:
    """Train nested bases for MODEL by distillation under sampled ranks (MatryoshkaKV)."""
    from nestling import kv
    from nestling.kv.adapter_files import check_place, expected_bytes, shares_of
    from nestling.kv.evaluation.check import checked
    from nestling.models import load_model

    check_outputs(json, html, folder=out)
    check_place(out)
    check_checkpoints(out, config.resume)
    if eval_text is None:
        texts, held_out = map(list, apart(source.read()))
    else:
        texts, held_out = list(source.read()), list(replace(source, text=eval_text).read())
    start = None if adapter is None else kv.KVAdapter.from_pretrained(adapter)
    language_model, tokenizer = loading(load_model, model)
    check_place(out, expected_bytes(language_model))
    config = replace(config, output_dir=out.with_name(f"{out.name}-checkpoints"))
    trained = kv.train(language_model, tokenizer, texts, start, config, eval_texts=held_out)
    if rank() > 0:  # under torchrun the first process speaks for all
        return
    trained = checked(language_model, tokenizer, held_out, trained)
    trained.save_pretrained(out)
    measured = trained.info["training"]
    rows = [p for p in measured["curve"] if any(name.startswith("kl") for name in p)]
    show(rows, f"{model}: KL on held-out text at shares of {shares_of(measured['sampling'])}")
    console.print(f"{measured['tokens']:,} tokens in {measured['seconds']} s. Saved to {out}")
    write_results(json, [{"model": model, **point} for point in measured["curve"]], measured["seconds"])
    if html is not None:
        from nestling.kv.report import write_training_report

        write_training_report(html, trained, title=f"{model}: training of nested bases")
        console.print(f"Report: {html}")


@kv_app.command()
@errors_as_messages
@takes(source=TextSource, config=SearchConfig)
def search(
    model: Model,
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Folder for the adapter with what was found.")],
    source: TextSource,
    config: SearchConfig,
    budgets: Budgets = "75,50,37.5,25",
    json: Json = None,
) -> None:
    """Search the ranks of layers and heads by measurement, for all budgets at once."""
    from nestling import kv
    from nestling.kv.adapter_files import check_place
    from nestling.kv.allocation.budget import read_shares
    from nestling.models import load_model

    check_outputs(json, folder=out)
    check_place(out)
    shares = read_shares(budgets, "--budgets")
    nested = kv.KVAdapter.from_pretrained(adapter)
    for share in shares:
        nested.allocate(share, quantise=False)  # a budget out of reach is said before the search
    texts = source.read()
    language_model, tokenizer = loading(load_model, model)
    start = time.perf_counter()
    searched = kv.search(language_model, tokenizer, texts, nested, config)
    seconds = time.perf_counter() - start
    searched.save_pretrained(out)
    console.print(f"{searched.info['search']['forwards']:,} forward passes in {seconds:.0f} s. Saved to {out}")
    rows = []
    for share in shares:
        keys, values = searched.allocate(share, quantise=False).coordinates.flatten(1).sum(1).tolist()
        kept = {"keys": 2 * keys / searched.full_elements, "values": 2 * values / searched.full_elements}
        rows.append({"model": model, "method": config.method, "budget": share.share, **kept})
    show(rows, f"share of keys and values kept, allocation={config.method}")
    write_results(json, rows, seconds)


@kv_app.command("eval")
@errors_as_messages
@takes(source=TextSource, config=EvalConfig)
def evaluate(
    model: Model,
    source: TextSource,
    config: EvalConfig,
    adapter: OwnAdapter = None,
    task: Annotated[list[Path] | None, typer.Option(help="Multiple-choice .jsonl; may be repeated.")] = None,
    rows: Annotated[int | None, typer.Option(help="Questions per task."), positive] = None,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write a report page to this file.")] = None,
) -> None:
    """Measure what budgets cost: KL to the full model, perplexity, top-1 agreement, tasks, bytes."""
    from nestling import kv
    from nestling.data.texts import read_multiple_choice
    from nestling.kv.report import shown_columns
    from nestling.models import load_model
    from nestling.report.tables import table

    check_outputs(json, html)
    nested = cache_adapter(model, adapter)
    tasks = {path.name.split(".")[0]: read_multiple_choice(path)[:rows] for path in task or []}
    texts = source.read()
    language_model, tokenizer = loading(load_model, model)
    start = time.perf_counter()
    result = kv.evaluate(language_model, tokenizer, texts, nested, replace(config, tasks=tasks))
    console.print(table(result, shown_columns(result), f"{model}, {config.windows} windows of {config.length} tokens"))
    write_results(json, result, time.perf_counter() - start)
    if html is not None:
        from nestling.kv.report import write_report

        least = min(config.budgets, key=lambda budget: budget.share)
        allocation = nested.allocate(least, config.allocation, quantise=config.quantise)
        write_report(html, nested, result, allocation, title=f"{model}: quality and bytes")
        console.print(f"Report: {html}")


@kv_app.command()
@errors_as_messages
@takes(config=CacheConfig)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The prompt; - reads standard input.")],
    config: CacheConfig,
    adapter: OwnAdapter = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most."), positive] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy."), not_negative] = 0.0,
) -> None:
    """Generate from a compressed cache, as a stream, and say what the cache took."""
    from nestling import kv
    from nestling.kv.demo import stream
    from nestling.models import load_model

    nested = cache_adapter(model, adapter)
    language_model, tokenizer = loading(load_model, model)
    cache = kv.NestedCache(language_model, nested, config)
    text = sys.stdin.read() if prompt == "-" else prompt
    console.print(stream(language_model, tokenizer, text, cache, max_new_tokens, temperature), style="dim")


@kv_app.command()
@errors_as_messages
@takes(cache=CacheConfig, config=ServeConfig)
def serve(
    model: Model,
    cache: CacheConfig,
    config: ServeConfig,
    adapter: OwnAdapter = None,
) -> None:
    """Serve MODEL to OpenAI's clients: chat, streamed or not, each request with a compressed cache of its own."""
    from nestling.integrations.serve.server import Listener

    listener = Listener(config)
    from nestling.integrations.serve.engine import Engine
    from nestling.models import load_model

    nested = cache_adapter(model, adapter)
    language_model, tokenizer = loading(load_model, model)
    server = listener.server(Engine(language_model, tokenizer, nested, cache, config))
    console.print(f"{model} at {listener.url}")
    server.run(sockets=[listener.socket])


@kv_app.command()
@errors_as_messages
@takes(config=CacheConfig)
def inspect(
    adapter: Adapter,
    config: CacheConfig,
    json: Json = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat map of bits to this file.")] = None,
) -> None:
    """Show what a cache takes: bits by layer and head, and bytes by length of text. No model is loaded."""
    from nestling import kv
    from nestling.kv.allocation.budget import read_budget
    from nestling.kv.cache.config import BUDGET
    from nestling.kv.cache.lengths import bytes_by_length, plan_of, shared_bytes
    from nestling.kv.evaluation.check import BUDGETS, expected
    from nestling.kv.report import bit_rows, bits_map, bits_table
    from nestling.report.figures import write_png

    check_outputs(json, png)
    nested = kv.KVAdapter.from_pretrained(adapter)
    lengths, shared = bytes_by_length(nested, config), shared_bytes(nested, config)
    allocation = plan_of(nested, config).allocation
    share = read_budget(BUDGET if config.budget is None else config.budget, "--budget").share
    assert share is not None, "limits alone are refused above"
    rows, asked = bit_rows(nested, allocation), f" at {share:.4g} of the full cache"
    console.print(bits_table(rows, f"bits per number, of 16,{asked}"))
    show(lengths, f"bytes by length{asked}")
    console.print(f"{shared:,} bytes of bases, which all caches of this adapter and allocation share")
    if allocation.stacked.unique().numel() > 2 and nested.quantises:
        loss = expected(nested, share, allocation)
        bound = "at most " if share > max(BUDGETS) else ""
        console.print(f"KL expected: {bound}{loss:.2g} nats a token to the full cache")
    write_results(json, [*rows, *lengths])
    if png is not None:
        write_png(png, bits_map(allocation, f"Bits{asked}"))
        console.print(f"Heat map: {png}")
