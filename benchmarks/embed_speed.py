"""Speed of cups as models of their own, in stock sentence-transformers: encoding, exact search, and the bytes of both.

    OMP_WAIT_POLICY=passive python benchmarks/embed_speed.py --model FOLDER [--beside minilm] [--threads 1]

Tokenising is in the times. All models are timed in turns (interleaved), and medians reported. `of_ideal` is the gain
over the full model against that of a model that costs nothing but its layers, depth / layers. `gflop_s` counts the
products of the layers' weights and of attention. The weights do not matter to the times: any model will do.
"""

import json
import random
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer
from rich.console import Console
from sentence_transformers import SentenceTransformer
from timing import medians

from nestling import embed
from nestling.embed.ladder import Ladder
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.parts import Encoder
from nestling.jobs.progress import progress_bar
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SHAPES = ((1, 16), (32, 16), (1, 128), (32, 128))  # texts a batch, tokens a text
VECTORS = 200_000  # of the index that is searched
WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def texts(count: int, tokens: int) -> list[str]:
    """Texts of common words, one token each, with the two special tokens that models add."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=tokens - 2)) for _ in range(count)]


def encoding(models: dict[str, SentenceTransformer], steps: int) -> list[dict]:
    """A row a model and shape."""
    rows = []
    with progress_bar() as bar:
        for batch, tokens in bar.track(SHAPES, description="encoding"):
            given = texts(batch, tokens)
            jobs = {
                name: partial(model.encode, given, prompt="", batch_size=batch, show_progress_bar=False)
                for name, model in models.items()
            }
            for name, median in medians(jobs, steps).items():
                model = models[name]
                flops = 2 * batch * tokens * (_weights(model) + 2 * tokens * _width(model) * Encoder.of(model).depth)
                rows.append(
                    {"model": name, "batch": batch, "tokens": tokens, "texts_per_s": batch / median,
                     "gflop_s": flops / median / 1e9}
                )  # fmt: skip
    return rows


def _weights(model: SentenceTransformer) -> int:
    """Of the matrices of all layers."""
    return sum(p.numel() for layer in Encoder.of(model).layers for p in layer.parameters() if p.ndim == 2)


def _width(model: SentenceTransformer) -> int:
    return Encoder.of(model).backbone.config.hidden_size


def search_ms(dims: int, steps: int) -> float:
    """Exact search of one query among `VECTORS` unit vectors of fp32, the ten best."""
    index = torch.randn(VECTORS, dims, generator=torch.Generator().manual_seed(0))
    query = torch.randn(dims)
    return 1000 * medians({"search": lambda: (index @ query).topk(10)}, steps)["search"]


def main(
    model: str = typer.Option(..., help="Folder or hub id."),
    ladder: str = typer.Option("", help="The sizes; by default the model's default ladder."),
    beside: str = typer.Option("minilm", help="A small model to compare with: alias, folder or hub id."),
    steps: int = typer.Option(9, help="Timed turns."),
    threads: int = typer.Option(1, help="Threads of torch."),
    out: Path = typer.Option(Path("benchmarks/results/embed_speed.json"), help="Joined with what is there."),
):
    began = time.monotonic()
    torch.set_num_threads(threads)
    encoder, name = load_encoder(model), Path(model).name
    encoder.max_seq_length = 128
    parts = Encoder.of(encoder)
    cups = Ladder.parse(ladder) if ladder else Ladder.default(parts.depth, parts.dims)
    with TemporaryDirectory() as folder:
        models = {}
        for cup in cups:
            exported = embed.ElasticEncoder(encoder, cups).export(cup, Path(folder) / cup.name)
            models[cup.name] = SentenceTransformer(str(exported.folder), device="cpu")
        models[Path(beside).name] = load_encoder(beside)
        rows = encoding(models, steps)
    full = {(row["batch"], row["tokens"]): row["texts_per_s"] for row in rows if row["model"] == cups.full.name}
    sizes = {key: sum(p.numel() * p.element_size() for p in m.parameters()) / 2**20 for key, m in models.items()}
    search = {key: search_ms(Encoder.of(m).dims, steps) for key, m in models.items()}
    for row in rows:
        small = models[row["model"]]
        gain = row["texts_per_s"] / full[row["batch"], row["tokens"]]
        ideal = parts.depth / Encoder.of(small).depth if row["model"] in [cup.name for cup in cups] else None
        row |= {"encoder": name, "over_full": gain, "of_ideal": ideal and gain / ideal, "mib": sizes[row["model"]],
                "bytes_per_vector": 4 * Encoder.of(small).dims, "search_ms": search[row["model"]]}  # fmt: skip
    old = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
    rows = [row for row in old if row["encoder"] != name] + rows
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, {**run_meta(time.monotonic() - began), "steps": steps, "vectors": VECTORS})
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
