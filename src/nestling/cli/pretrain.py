"""The command ``nestling embed pretrain``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.data import KINDS, TEXT, Columns, Lines, columns_of, layout_of, show_what_is_told
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
    part,
    positive,
    show,
    write_curve,
)


@errors_as_messages
def pretrain(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go beside it.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimiser."), positive],
    text: Annotated[
        list[str] | None, typer.Option(help=f".txt (or .gz), {KINDS}; may be repeated; default: built-in pages.")
    ] = None,
    columns: Columns = None,
    lines: Lines = None,
    cups: Cups = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls, for a folder of transformers' own, which has no pooling.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of text a step, over all processes."), positive] = 64,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a window; default: the model's, 512 at most."), positive
    ] = None,
    encoder_ratio: Annotated[float, typer.Option(help="Share of the tokens that the encoder predicts."), part] = 0.2,
    decoder_ratio: Annotated[float, typer.Option(help="Share of the tokens that the decoder predicts."), part] = 0.4,
    decoder: Annotated[
        str, typer.Option(help="plain, enhanced (RetroMAE's), or none: masked-language modelling alone.")
    ] = "plain",
    cups_per_step: Annotated[
        int | None, typer.Option(help="Cups of a step, the full one among them."), positive
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW."), above_zero] = 1e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises."), less_than_one] = 0.05,
    skip_bad: Annotated[bool, typer.Option(help="Leave out bad lines of files, and count them.")] = False,
    seed: Seed = 0,
    bf16: Annotated[bool, typer.Option(help="Autocast to bf16; fast where the processor has it.")] = False,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; default: a tenth."), positive
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    json: Json = None,
    html: Html = None,
) -> None:
    """Pre-train MODEL on text alone, so that every cup can rebuild what it reads: a start for `embed train`."""
    from nestling import embed
    from nestling.embed.training.arguments import rank

    check_outputs(json, html, folder=out, new=not resume)
    check_checkpoints(out, resume)
    show_what_is_told()
    named = columns_of(columns, TEXT) or None
    texts = embed.Texts(text or [None], skip_bad, columns=named, layout=layout_of(lines))
    encoder = loading(partial(embed.load_encoder, pooling=pooling), model)
    if cups is None and Path(model).is_dir():
        cups = str(embed.load_ladder(model) or "") or None
    more: dict[str, Any] = {} if save_steps is None else {"save_steps": save_steps}
    trained = embed.pretrain(
        encoder, texts, cups, folder=out, steps=steps, batch_size=batch_size, length=length,
        encoder_ratio=encoder_ratio, decoder_ratio=decoder_ratio,
        decoder=None if decoder == "none" else decoder,  # type: ignore[arg-type]
        cups_per_step=cups_per_step, learning_rate=learning_rate, warmup=warmup, seed=seed, resume=resume, bf16=bf16,
        **more,
    )  # fmt: skip
    if rank() > 0:  # under torchrun the first process speaks for all
        return
    info = trained.info
    show(_first_and_last(trained), f"{model}: nats per masked token, by the encoder and by the decoder")
    for count, what in ((info["bad_lines"], "Bad lines"), (info["left_out"], "Windows with nothing to mask")):
        if count:
            console.print(f"{what} left out: {count:,}")
    console.print(
        f"{info['steps']:,} steps, {info['tokens']:,} tokens in {info['seconds']} s, {info['head']} masked-language "
        f"head. Saved to {out}"
    )
    write_curve(model, trained, json, html, "pre-training of every cup")


def _first_and_last(trained: Any) -> list[dict[str, Any]]:
    """The losses of a pre-training at the first and the last point of the curve, a row a cup."""
    points = [point for point in trained.info["curve"] if "loss" in point]
    rows = []
    for cup in trained.ladder:
        row: dict[str, Any] = {"cup": cup.name}
        for kind in ("mlm", "dec"):
            found = [point[f"{kind}_{cup}"] for point in points if f"{kind}_{cup}" in point]
            row |= {f"{kind} first": found[0], f"{kind} last": found[-1]} if found else {}
        rows.append(row)
    return rows
