"""The commands of the embedding wing: ``nestling embed pretrain|align|train|eval|export|encode|search``.

Commands only parse, call the library and print. Heavy imports happen inside them, so that ``--help`` is quick.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.data import Language, TextSource
from nestling.cli.encode import encode
from nestling.cli.export import export
from nestling.cli.options import takes
from nestling.cli.pretrain import pretrain
from nestling.cli.search import search
from nestling.cli.sets import EncoderSets, TrainingData
from nestling.cli.terminal import (
    Adapter,
    Encoder,
    Html,
    Json,
    Sizes,
    check_checkpoints,
    check_outputs,
    console,
    errors_as_messages,
    loaded_encoder,
    loading,
    positive,
    show,
    write_curve,
    write_results,
)
from nestling.data.told import Rows
from nestling.embed.training.config import TrainConfig
from nestling.errors import TextTooShortError

embed_app = typer.Typer(
    no_args_is_help=True,
    help="Sentence encoders of every size: align, or pretrain and train; eval, export, encode, search.",
)
embed_app.command()(pretrain)

HELD_OUT = 8  # one sentence in so many is kept for a look at what was aligned, 500 at most
KEPT = {
    "best": "The checkpoint that is best on held-out data was kept, of step {step}.",
    "start": "No checkpoint is better on held-out data than the start, which was kept as it was.",
    "last": "Nothing was measured: the last step was kept.",
}


@embed_app.command()
@errors_as_messages
@takes(source=TextSource)
def align(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    source: TextSource,
    language: Language = "en",
    sizes: Sizes = None,
    prompt: Annotated[str | None, typer.Option(help="Text before each sentence; default: the model's own.")] = None,
    json: Json = None,
) -> None:
    """Make small sizes of MODEL without training it, in closed form from text without labels; MODEL stays as it is."""
    check_outputs(json, folder=out, new=True)
    texts = source.sentences(language)
    read = Rows((text for i, text in enumerate(texts) if i % HELD_OUT), texts.left_out)
    held = texts[::HELD_OUT][:500]
    if len(texts) < 100:
        raise TextTooShortError(
            f"{source.text}: {len(texts)} sentences are too few, expected some thousands, 100 at least"
        )
    encoder = loaded_encoder(model, sizes, None)
    encoder.projections = {}
    rows = encoder.agreement(held, prompt=prompt, method="cut")
    encoder.align(read, prompt=prompt)
    with console.status(f"comparing {len(held)} sentences"):
        rows = rows + encoder.agreement(held, prompt=prompt, method="aligned")
    encoder.save_pretrained(out)
    info = encoder.info["alignment"]
    show(rows, f"{model}: agreement of sizes with the full model on {len(held)} held-out sentences")
    console.print(f"{info['texts']:,} sentences in {info['seconds']} s. Saved to {out}")
    write_results(json, [{"model": model, **row} for row in rows], info["seconds"])


@embed_app.command()
@errors_as_messages
@takes(data=TrainingData, config=TrainConfig)
def train(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go beside it.")],
    data: TrainingData,
    config: TrainConfig,
    sizes: Sizes = None,
    teacher: Annotated[str | None, typer.Option(help="Another encoder that all sizes follow.")] = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Train the sizes of MODEL, on texts the small ones alone; they never end below their aligned start."""
    from nestling.embed.model.loading import load_encoder
    from nestling.jobs.processes import rank

    check_outputs(json, html, folder=out, new=not config.resume)
    check_checkpoints(out, config.resume)
    rows, evaluator = data.rows(), data.evaluator()
    encoder = loaded_encoder(model, sizes, None)
    other = None if teacher is None else loading(load_encoder, teacher)
    encoder.train(rows, replace(config, output_dir=out), evaluator=evaluator, teacher=other)
    if rank() > 0:  # under torchrun the first process speaks for all
        return
    info = encoder.info["training"]
    _show_training(model, encoder.sizes, info)
    console.print(KEPT[info["kept"]].format(step=info.get("best_step")))
    console.print(f"{info['steps']:,} steps of {info['batch_size']} in {info['seconds']} s. Saved to {out}")
    write_curve(model, info, json, html, "training of every size")


@embed_app.command("eval")
@errors_as_messages
@takes(sets=EncoderSets)
def evaluate(
    model: Encoder,
    sets: EncoderSets,
    sizes: Sizes = None,
    adapter: Adapter = "auto",
    grid: Annotated[bool, typer.Option(help="Every depth of the sizes at every width of them.")] = False,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch."), positive] = 32,
    json: Json = None,
    html: Html = None,
) -> None:
    """Measure every size of MODEL: STS and retrieval, or, without labelled data, agreement with the full size."""
    check_outputs(json, html)
    evaluator, prompts = sets.evaluator(batch_size=batch_size, progress=True), sets.prompts()
    texts = [] if evaluator is not None else sets.sentences()[:1000]
    encoder = loaded_encoder(model, sizes, adapter)
    if grid:
        encoder.sizes = encoder.sizes.grid
    start = time.perf_counter()
    if evaluator is not None:
        rows = encoder.evaluate(evaluator=evaluator, model_name=model)
    else:
        with console.status(f"comparing {len(texts)} sentences"):
            rows = encoder.agreement(texts, prompt=prompts.get("sts"), batch_size=batch_size)
        rows = [{"model": model, **row} for row in rows]
    show([{k: v for k, v in row.items() if k != "method"} for row in rows], f"{model}: quality of every size")
    write_results(json, rows, time.perf_counter() - start)
    if html is not None:
        from nestling.embed.report import write_evaluation

        write_evaluation(html, rows, title=f"{model}: quality of every size", grid=grid)
        console.print(f"Report: {html}")


def _show_training(model: str, sizes: Any, info: dict[str, Any]) -> None:
    """A row a size: its loss in the first and the last point of the curve, and what was measured at the one kept."""
    from nestling.embed.export.card import measured

    losses = [point for point in info["curve"] if "loss" in point]
    rows = []
    for size, found in zip(sizes, measured(sizes, info), strict=True):
        row: dict[str, Any] = {"size": size.name}
        for when, point in (("first", losses[0]), ("last", losses[-1])) if losses else ():
            parts = [v for k, v in point.items() if k in (size.name, f"kl_{size}")]
            row |= {f"{when} loss": sum(parts)} if parts else {}
        rows.append(row | found)
    show(rows, f"{model}: every size, in training")


embed_app.command()(export)
embed_app.command()(encode)
embed_app.command()(search)
