"""What the parts of the training are worth: short runs of our recipe, each with one thing changed.

    python benchmarks/kv_ablate.py --data FOLDER --start CALIBRATED [--pca CALIBRATED] [--arms path,independent]

All runs see the same texts in the same order, and everything is compressed, as in the paper: beside exact tokens
short trainings differ by less than they can be told apart. What is measured is the KL on held-out WikiText at shares
of the ranks, read as in a decode. Arms that are in the results file already are not run again.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import typer
from kv_train import HELD_OUT, corpus
from rich.console import Console
from torch import Tensor

from nestling import kv
from nestling.data.texts import read_texts
from nestling.data.windows import token_windows
from nestling.kv.adapter_files import SIDES
from nestling.kv.calibration.fit import measure
from nestling.kv.simulation import student
from nestling.kv.simulation.projections import Projected
from nestling.models import load_model
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

EXACT = {"sinks": 0, "window": 0}
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)
ARMS: dict[str, dict] = {  # name: changes to the default recipe
    "path": {},
    "independent": {"sampling": "independent"},
    "KL:CE 1:1": {"kl_weight": 0.5, "ce_weight": 0.5},
    "KL:CE 1:3": {"kl_weight": 0.25, "ce_weight": 0.75},
    "not orthogonal": {},
    "random start": {},
    "PCA start": {},
    "uniform ranks": {"allocation": "uniform"},
    "lr 5e-4": {"learning_rate": 5e-4},
    "lr 5e-3": {"learning_rate": 5e-3},
}
STARTS = {"path": "untrained", "random start": "random, untrained", "PCA start": "PCA, untrained"}


class FreeBases(student.MaskedBases):
    """The paper's ablation without orthogonality: ``encode U mask U^T decode`` with any U = I + X, so that the full
    rank is the identity no more."""

    def __init__(self, adapter: kv.KVAdapter):
        super().__init__(adapter)
        self.free.fill_(True)

    def projected(self, mask: Tensor) -> Projected:
        u = torch.eye(self.encode.shape[-1], device=self.encode.device) + self.rotation.x
        return Projected.about(self.mean, (self.encode @ u * mask[..., None, :]) @ (u.mT @ self.decode))


def random_start(lm, adapter: kv.KVAdapter, windows: Tensor) -> kv.KVAdapter:
    """Random orthogonal bases, with costs measured for them."""
    rng = torch.Generator().manual_seed(0)
    encode = {s: torch.linalg.qr(torch.randn(adapter.encode[s].shape, generator=rng)).Q for s in SIDES}
    changed = replace(adapter, encode=encode)
    return measure(lm, changed, windows, kv.FitConfig(**EXACT))


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    start: Path = typer.Option(..., help="The calibrated adapter to start from."),
    pca: Path | None = typer.Option(None, help="The same with PCA bases, for that arm."),
    arms: str = typer.Option(",".join(ARMS), help="What is run."),
    model: str = typer.Option("smollm2", help="Alias, folder, GGUF file or hub id."),
    tokens: int = typer.Option(2**14, help="Tokens to train on."),
    length: int = typer.Option(512, help="Tokens per text; one text a step."),
    windows: int = typer.Option(4, help="Held-out texts."),
    out: Path = typer.Option(Path("benchmarks/results/kv_ablate.json"), help="Results; joined with what is there."),
):
    lm, tokenizer = load_model(model)
    if torch.cuda.is_available():
        lm = lm.cuda()
    texts = corpus(data, tokenizer, tokens, length, 0)
    held_out = torch.stack(list(token_windows(tokenizer, read_texts(str(data / HELD_OUT)), length, limit=windows)))
    settings = {"model": Path(model).name, "tokens": tokens, "length": length, "windows": windows}
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"settings": settings}}
    if old["meta"]["settings"] != settings:
        raise typer.BadParameter(f"{out.name} has other settings, {old['meta']['settings']} and not {settings}")
    rows = old["rows"]
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {row["arm"] for row in rows}
    for name in arms.split(","):
        if name in known or (name == "PCA start" and pca is None):
            continue
        began = time.monotonic()
        adapter = kv.KVAdapter.from_pretrained(pca if name == "PCA start" else start)
        if name == "random start":
            adapter = random_start(lm, adapter, texts)
        bases = FreeBases if name == "not orthogonal" else student.MaskedBases
        with (
            TemporaryDirectory() as folder,
            mock.patch.object(student, "MaskedBases", bases),
            mock.patch("nestling.kv.training.train.measure", lambda lm, trained, *_, **__: trained),  # not used
        ):
            often = {"eval_on_start": name in STARTS, "eval_steps": tokens // length, "save_strategy": "no"}
            config = kv.TrainConfig(
                output_dir=folder, tokens=tokens, length=length, batch_size=1, eval_windows=windows, budgets=SHARES,
                arguments=often, **EXACT, **ARMS[name],
            )  # fmt: skip
            trained = kv.train(lm, None, texts, adapter, config, eval_texts=held_out)
        for point in trained.info["training"]["curve"]:
            if measured := {k: v for k, v in point.items() if k.startswith("kl")}:
                rows.append({"arm": name if point["step"] else STARTS[name], **measured})
        write_json(out, rows, {**run_meta(time.monotonic() - began), "settings": settings})
    Console().print(table(rows, title=f"KL at shares of the ranks after {tokens:,} tokens"))


if __name__ == "__main__":
    typer.run(main)
