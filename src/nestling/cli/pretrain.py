"""The command ``nestling embed pretrain``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.data import KINDS, TEXT, TextSource, show_what_is_told
from nestling.cli.options import takes
from nestling.cli.terminal import (
    Encoder,
    Html,
    Json,
    Sizes,
    check_checkpoints,
    check_outputs,
    console,
    errors_as_messages,
    loading,
    show,
    write_curve,
)
from nestling.config import option
from nestling.embed.pretraining.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class TextSources(TextSource):
    """Several texts, one after the other."""

    text: list[str] | None = option(  # type: ignore[assignment]
        None, f".txt (or .gz), {KINDS}; may be repeated; default: built-in pages."
    )


@errors_as_messages
@takes(source=TextSources, config=PretrainConfig)
def pretrain(
    model: Encoder,
    out: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go beside it.")],
    source: TextSources,
    config: PretrainConfig,
    sizes: Sizes = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls, for a folder of transformers' own, which has no pooling.")
    ] = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Pre-train MODEL on text alone, so that every size can rebuild what it reads: a start for `embed train`."""
    from nestling import embed
    from nestling.jobs.processes import rank

    check_outputs(json, html, folder=out, new=not config.resume)
    check_checkpoints(out, config.resume)
    show_what_is_told()
    texts = embed.Texts(
        source.text or [None], config.skip_bad, columns=source.named(TEXT) or None, layout=source.layout
    )
    encoder = loading(lambda name: embed.ElasticEncoder.from_pretrained(name, sizes, pooling=pooling), model)
    encoder.pretrain(texts, replace(config, output_dir=out))
    if rank() > 0:  # under torchrun the first process speaks for all
        return
    info = encoder.info["pretraining"]
    show(_first_and_last(encoder.sizes, info), f"{model}: nats per masked token, by the encoder and by the decoder")
    for count, what in ((info["bad_lines"], "Bad lines"), (info["left_out"], "Windows with nothing to mask")):
        if count:
            console.print(f"{what} left out: {count:,}")
    console.print(
        f"{info['steps']:,} steps, {info['tokens']:,} tokens in {info['seconds']} s, {info['head']} masked-language "
        f"head. Saved to {out}"
    )
    write_curve(model, info, json, html, "pre-training of every size")


def _first_and_last(sizes: Any, info: dict[str, Any]) -> list[dict[str, Any]]:
    """The losses of a pre-training at the first and the last point of the curve, a row a size."""
    points = [point for point in info["curve"] if "loss" in point]
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"size": size.name}
        for side, kind in (("encoder", "mlm"), ("decoder", "dec")):
            losses = [point[f"{kind}_{size}"] for point in points if f"{kind}_{size}" in point]
            row |= {f"{side}, first": losses[0], f"{side}, last": losses[-1]} if losses else {}
        rows.append(row)
    return rows
