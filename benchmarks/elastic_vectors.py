"""Vectors of MiniLM at every depth, computed once and kept in a folder, for experiments that train no layer.

`Source.vectors` gives those of one group: the sentences of all STS sets, the documents or queries of a retrieval set,
or texts to fit on, none of which is measured on: short ``texts`` and longer ``passages`` of elastic_data.py, and
pieces of public-domain ``books``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from embed_data import RETRIEVAL, held_out_sets
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestling import ElasticEncoder
from nestling.data.retrieval import read_retrieval
from nestling.data.rows import open_rows
from nestling.data.texts import read_texts
from nestling.embed import ElasticAdapter, GridEvaluator
from nestling.embed.model.encode import encode

LENGTH = 128  # tokens of a text
FITTED = {"texts": 4000, "passages": 2500}
LONG = 300  # characters of a passage, at least
PIECE = 100  # words of a book
GROUPS = (*FITTED, *(f"{name}-{use}" for name in RETRIEVAL for use in ("documents", "queries")), "sts")


@dataclass(frozen=True)
class Vectors:
    """Pooled vectors of texts.

    Attributes:
        small: by depth, those of the packaged sizes' layers, before their maps ``[n, 384]``.
        full: of the full model ``[n, 384]``.
        tokens: of each text ``[n]``.
    """

    small: dict[int, Tensor]
    full: Tensor
    tokens: Tensor


class Source:
    """A model, its adapter, and the groups of texts."""

    def __init__(self, data: Path, texts: Path, model: str, adapter: str, work: Path):
        self.data, self.texts, self.work = data, texts, work
        self.encoder = ElasticEncoder.from_pretrained(model, adapter=ElasticAdapter.from_pretrained(adapter))
        self.encoder.model.max_seq_length = LENGTH
        self.adapter = self.encoder.adapter
        self.body = self.adapter.body(self.encoder.model)
        self.body.max_seq_length = LENGTH
        work.mkdir(parents=True, exist_ok=True)

    def strings(self, group: str) -> list[str]:
        """The texts of a group, in a fixed order."""
        if group == "sts":
            return list(GridEvaluator(sts=held_out_sets(self.data)["sts"]).sentences)
        if group in FITTED:
            kinds: dict[str, Callable[[], Iterator[str]]] = {"texts": self._lines, "books": self._pieces}
            kinds["passages"] = lambda: (text for text in self._lines() if len(text) >= LONG)
            return list(islice(kinds[group](), FITTED[group]))
        name, use = group.split("-")
        found = read_retrieval(str(held_out_sets(self.data)["retrieval"][name]))
        return [found.corpus[key] for key in sorted(found.corpus)] if use == "documents" else list(
            found.queries.values())  # fmt: skip

    def _lines(self) -> Iterator[str]:
        yield from read_texts(self.texts, layout="lines")

    def _pieces(self) -> Iterator[str]:
        for _, row in open_rows(str(self.data / "long/books.jsonl.gz")).rows:
            words = str(row["text"]).split()[5000:]  # behind what is printed at the front
            yield from (" ".join(words[start : start + PIECE]) for start in range(0, min(len(words), 12_000), PIECE))

    def vectors(self, group: str) -> Vectors:
        """Those of a group, from the folder if they are there."""
        path = self.work / f"{group}.safetensors"
        if not path.is_file():
            self._write(path, self.strings(group))
        found = load_file(path)
        return Vectors({depth: found[str(depth)].float() for depth in range(1, 5)}, found["full"].float(),
                       found["tokens"])  # fmt: skip

    def _write(self, path: Path, strings: list[str]) -> None:
        model = self.encoder.model
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            small = encode(self.body, strings, dict.fromkeys(range(1, 5), 384))
            full = encode(model, strings, {6: 384})[6]
        cut = [min(LENGTH, len(ids)) for ids in model.tokenizer(strings)["input_ids"]]
        tensors = {str(depth): found for depth, found in small.items()}
        save_file({**tensors, "full": full, "tokens": torch.tensor(cut)}, path)
