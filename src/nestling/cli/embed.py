"""The commands of the embedding wing: ``nestling embed pretrain|align|train|eval|export``.

Commands only parse, call the library and print. Heavy imports happen inside them, so that ``--help`` is quick.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.data import (
    STS,
    TEXT,
    Columns,
    Language,
    Lines,
    Pairs,
    PositiveLabel,
    Retrieval,
    Scored,
    Sts,
    Text,
    columns_of,
    evaluator_of,
    layout_of,
    pairs_from,
    scored_from,
)
from nestling.cli.data import sentences_from as _sentences
from nestling.cli.export import export, ladder_of
from nestling.cli.pretrain import pretrain
from nestling.cli.terminal import (
    Cups,
    Encoder,
    Html,
    Json,
    Seed,
    above_zero,
    check_checkpoints,
    check_outputs,
    console,
    errors_as_messages,
    less_than_one,
    loading,
    not_negative,
    positive,
    show,
    write_curve,
    write_results,
)
from nestling.data.told import Rows
from nestling.errors import OptionError, TextTooShortError

embed_app = typer.Typer(
    no_args_is_help=True, help="Sentence encoders of every size: align, or pretrain and train; eval, export."
)
embed_app.command()(pretrain)

HELD_OUT = 8  # one sentence in so many is kept for a look at what was aligned, 500 at most


@embed_app.command()
@errors_as_messages
def align(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    text: Text = None,
    columns: Columns = None,
    lines: Lines = None,
    language: Language = "en",
    cups: Cups = None,
    prompt: Annotated[str | None, typer.Option(help="In front of each sentence; default: the model's own.")] = None,
    json: Json = None,
) -> None:
    """Make small cups of MODEL without training it, in closed form from text without labels; MODEL stays as it is."""
    from nestling import embed

    check_outputs(json, folder=out, new=True)
    texts = _sentences(text, lines, columns_of(columns, TEXT), language)
    read = Rows((text for i, text in enumerate(texts) if i % HELD_OUT), texts.left_out)
    held = texts[::HELD_OUT][:500]
    if len(texts) < 100:
        raise TextTooShortError(f"{text}: {len(texts)} sentences are too few, expected some thousands, 100 at least")
    encoder = loading(embed.load_encoder, model)
    ladder, _ = ladder_of(model, cups, encoder, projected=False)
    aligned = embed.align(encoder, read, ladder, folder=out, prompt=prompt)
    with console.status(f"comparing {len(held)} sentences"):
        rows = embed.agreement(encoder, held, ladder, projections={}, prompt=prompt, method="cut")
        rows += embed.agreement(
            encoder, held, ladder, projections=aligned.projections, prompt=prompt, method="aligned"
        )
    show(rows, f"{model}: agreement of cups with the full model on {len(held)} held-out sentences")
    console.print(f"{aligned.info['texts']:,} sentences in {aligned.info['seconds']} s. Saved to {out}")
    write_results(json, [{"model": model, **row} for row in rows], aligned.info["seconds"])


@embed_app.command()
@errors_as_messages
def train(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go beside it.")],
    pairs: Pairs = None,
    positive_label: PositiveLabel = None,
    scored: Scored = None,
    text: Annotated[
        str | None,
        typer.Option(help="Documents to follow the model itself on, without labels; default: built-in pages."),
    ] = None,
    columns: Columns = None,
    lines: Lines = None,
    language: Language = "en",
    cups: Cups = None,
    teacher: Annotated[str | None, typer.Option(help="Another encoder that all cups follow.")] = None,
    projection: Annotated[
        str | None,
        typer.Option(help="Of small cups: aligned, centred, pca or none; default: MODEL's, if any, else aligned."),
    ] = None,
    projection_rate: Annotated[
        float, typer.Option(help="Learning rate of the projections; 0: they stay as they are."), not_negative
    ] = 5e-3,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser; default: by --epochs."), positive] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default: 1."), above_zero] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows a step, over all processes; default 64."), positive
    ] = None,
    mini_batch_size: Annotated[
        int | None, typer.Option(help="Rows embedded at a time, for large batches."), positive
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW."), above_zero] = 5e-5,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises."), less_than_one] = 0.1,
    weight: Annotated[list[str] | None, typer.Option(help="Of a cup, such as 12x768=3; may be repeated.")] = None,
    sts: Sts = None,
    retrieval: Retrieval = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="By column, such as anchor='query: '; may be repeated; default: the model's own."),
    ] = None,
    seed: Seed = 0,
    bf16: Annotated[bool, typer.Option(help="Autocast to bf16; fast where the processor has it.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: slower, less memory.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    json: Json = None,
    html: Html = None,
) -> None:
    """Train MODEL so that every cup is good by itself; measured on --sts and --retrieval, the best is kept."""
    from nestling import embed
    from nestling.data.pairs import KNOWN
    from nestling.embed.training.arguments import rank

    check_outputs(json, html, folder=out, new=not resume)
    check_checkpoints(out, resume)
    named = columns_of(columns, KNOWN if pairs else STS if scored else TEXT, STS if sts else ())
    data = _training_data(pairs, scored, text, named, positive_label, lines, language)
    if steps is not None and epochs is not None:
        raise OptionError(f"--steps {steps} and --epochs {epochs:g}: both say how long, leave one out")
    weights = dict(_weight(item) for item in weight or ())
    prompts = dict(_prompt(item) for item in prompt or ())
    evaluator = evaluator_of(sts, retrieval, named)
    encoder = loading(embed.load_encoder, model)
    other = None if teacher is None else loading(embed.load_encoder, teacher)
    ladder, found = ladder_of(model, cups, encoder, projected=projection is None)
    start: Any = {depth: found[depth] for depth in ladder.layers if depth in found} or "auto"
    if projection is not None:
        start = None if projection == "none" else projection
    more: dict[str, Any] = {"gradient_checkpointing": True} if checkpointing else {}
    trained = embed.train(
        encoder, data, ladder, folder=out, teacher=other, projection=start, projection_rate=projection_rate or None,
        steps=steps, epochs=1.0 if epochs is None else epochs, batch_size=batch_size, mini_batch_size=mini_batch_size,
        learning_rate=learning_rate, warmup=warmup, seed=seed, evaluator=evaluator, prompts=prompts or None,
        recipe={"weights": weights} if weights else None, resume=resume, bf16=bf16, **more,
    )  # fmt: skip
    if rank() > 0:  # under torchrun the first process speaks for all
        return
    info = trained.info
    _show_training(model, trained)
    console.print(f"{info['steps']:,} steps of {info['batch_size']} in {info['seconds']} s. Saved to {out}")
    write_curve(model, trained, json, html, "training of every cup")


@embed_app.command("eval")
@errors_as_messages
def evaluate(
    model: Encoder,
    sts: Sts = None,
    retrieval: Retrieval = None,
    text: Text = None,
    columns: Columns = None,
    lines: Lines = None,
    language: Language = "en",
    cups: Cups = None,
    grid: Annotated[bool, typer.Option(help="Every depth of the ladder at every width of it.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="By use, such as query='query: '; uses: sts, query, passage; default: the model's own."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a forward."), positive] = 32,
    json: Json = None,
    html: Html = None,
) -> None:
    """Measure every cup of MODEL: STS and retrieval, or, without labelled data, agreement with the full size."""
    from nestling import embed
    from nestling.embed.ladder import Ladder

    check_outputs(json, html)
    if text is not None and (sts or retrieval):
        raise OptionError("--text is what is measured on where there is no --sts and no --retrieval: leave it out")
    prompts = dict(_prompt(item) for item in prompt or ())
    uses = (["query", "passage"] if retrieval else []) + (["sts"] if sts or not retrieval else [])
    if unused := [use for use in prompts if use not in uses]:
        raise OptionError(f"--prompt {unused[0]}: nothing that is measured has that use, expected {', '.join(uses)}")
    named = columns_of(columns, STS if sts else (), () if sts or retrieval else TEXT)
    options = {"prompts": prompts, "batch_size": batch_size, "progress": True, "grid": grid}
    evaluator = evaluator_of(sts, retrieval, named, **options)
    texts = [] if evaluator is not None else _sentences(text, lines, named, language)[:1000]
    encoder = loading(embed.load_encoder, model)
    ladder, found = ladder_of(model, cups, encoder)
    projections = found or None
    start = time.perf_counter()
    if evaluator is not None:
        evaluator.ladder, evaluator.projections = ladder, projections
        rows = evaluator.rows(encoder, model_name=model)
    else:
        dims = sorted({cup.dims for cup in ladder})
        sizes = Ladder((layers, width) for layers in ladder.layers for width in dims) if grid else ladder
        with console.status(f"comparing {len(texts)} sentences"):
            rows = embed.agreement(
                encoder, texts, sizes, projections=projections, prompt=prompts.get("sts"), batch_size=batch_size
            )
        rows = [{"model": model, **row} for row in rows]
    show([{k: v for k, v in row.items() if k != "method"} for row in rows], f"{model}: quality of every cup")
    write_results(json, rows, time.perf_counter() - start)
    if html is not None:
        from nestling.embed.report import write_evaluation

        write_evaluation(html, rows, title=f"{model}: quality of every cup", grid=grid)
        console.print(f"Report: {html}")


def _training_data(
    pairs: list[str] | None,
    scored: str | None,
    text: str | None,
    columns: dict[str, str],
    positive: str | None,
    lines: bool | None,
    language: str,
) -> Rows:
    """What is trained on; built-in text if nothing is named.

    Raises:
        OptionError: more than one kind is named, or an option of a kind that is not.
        DataError: the data cannot be read.
    """
    named = [flag for flag, value in (("--pairs", pairs), ("--scored", scored), ("--text", text)) if value]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)}: only one kind of data can be trained on at a time, leave one out")
    if positive is not None and not pairs:
        raise OptionError(f"--positive-label {positive}: that is of --pairs, leave it out")
    if lines is not None and (pairs or scored):
        raise OptionError(f"--{layout_of(lines)}: that is of --text, leave it out")
    if pairs:
        return pairs_from(pairs, columns, positive)
    return scored_from(scored, columns) if scored else _sentences(text, lines, columns, language)


def _weight(item: str) -> tuple[str, float]:
    cup, _, number = item.partition("=")
    try:
        return cup.strip(), float(number)
    except ValueError:
        raise OptionError(f"--weight {item!r}: expected a cup and a number, such as 12x768=3") from None


def _prompt(item: str) -> tuple[str, str]:
    use, equals, prompt = item.partition("=")
    if not equals:
        raise OptionError(f"--prompt {item!r}: expected a name and a text, such as query='query: '")
    return use.strip(), prompt


def _show_training(model: str, trained: Any) -> None:
    """A row a cup: its loss in the first and the last point of the curve, and what was measured at the one kept."""
    from nestling.embed.export.card import measured

    losses = [point for point in trained.info["curve"] if "loss" in point]
    rows = []
    for cup, found in zip(trained.ladder, measured(trained.ladder, trained.info), strict=True):
        row: dict[str, Any] = {"cup": cup.name}
        for when, point in (("first", losses[0]), ("last", losses[-1])) if losses else ():
            row[f"{when} loss"] = sum(v for k, v in point.items() if k in (cup.name, f"kl_{cup.name}"))
        rows.append(row | found)
    show(rows, f"{model}: every cup, in training")


embed_app.command()(export)
