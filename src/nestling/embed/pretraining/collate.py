"""Masked batches as tensors: each process, and each step of accumulation, gets its rows of the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nestling.embed.pretraining.corpus import Batch, Corpus, Position
from nestling.embed.pretraining.masking import Masking


@dataclass(frozen=True)
class Collator:
    """A batch of windows as `nestling.embed.pretraining.autoencoder.MaskedAutoencoder` reads it, in parts.

    Random numbers are the batch's own and drawn for all of its rows, so a part is the same however many there are.

    Attributes:
        sizes, sampled: how many there are, and how many are trained in a step (the full one always); None for all.
    """

    masking: Masking
    padding: int
    sizes: int
    sampled: int | None = None

    def __call__(self, batch: Batch, parts: int = 1) -> list[dict[str, Tensor]]:
        windows, rng = batch.windows, batch.rng
        masked = [self.masking(window, rng) for window in windows]
        width = max(len(window.ids) for window in windows)
        table: dict[str, Tensor] = {
            "input_ids": _stacked([m.encoder_ids for m in masked], width, self.padding),
            "attention_mask": _stacked([np.ones_like(window.ids) for window in windows], width, 0),
            "labels": _stacked([window.ids for window in windows], width, self.padding),
            "masked": _stacked([m.encoder_mask for m in masked], width, False),
            "decoder_ids": _stacked([m.decoder_ids for m in masked], width, self.padding),
            "rebuilt": _stacked([m.decoder_mask for m in masked], width, False),
        }
        shared: dict[str, Tensor] = {
            "share": parts / table["masked"].sum(),
            "decoder_share": parts / table["rebuilt"].sum(),
        }
        if self.sampled is not None:
            some = rng.choice(self.sizes - 1, self.sampled - 1, replace=False)
            shared["sizes"] = torch.tensor([*sorted(some.tolist()), self.sizes - 1])
        rows = [{name: tensor.chunk(parts)[part] for name, tensor in table.items()} for part in range(parts)]
        return [{**row, **shared} for row in rows]


class MaskedBatches(IterableDataset):
    """What one process reads: its parts of ``steps`` batches, one for each step of accumulation.

    Each has ``after``, the `Position` behind its batch, as a dict, and ``tokens``: how many the global batch has, in
    the first part that a process takes of it, and 0 in the others.

    Args:
        rank, processes, accumulation: which process this is, of how many, and parts that each takes of a batch.
    """

    def __init__(self, corpus: Corpus, collator: Collator, steps: int, start: Position, rank=0, processes=1,
                 accumulation=1):  # fmt: skip
        self.corpus, self.collator, self.steps, self.start = corpus, collator, steps, start
        self.rank, self.processes, self.accumulation = rank, processes, accumulation

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.corpus.batches(self.start):
            parts = self.collator(batch, self.processes * self.accumulation)
            after, tokens = batch.after.to_json(), sum(len(window.ids) for window in batch.windows)
            for turn in range(self.accumulation):
                part = parts[turn * self.processes + self.rank]
                yield {**part, "after": after, "tokens": 0 if turn else tokens}


def _stacked(rows: list[np.ndarray], width: int, padding: int | bool) -> Tensor:
    """Rows of different lengths, filled up on the right: ``[B, width]``."""
    found = np.full((len(rows), width), padding, dtype=rows[0].dtype)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(found)
