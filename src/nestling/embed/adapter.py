"""ElasticAdapter: trained small sizes of one encoder, in a file of some megabytes; the encoder stays as it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from nestling.embed.adapter_files import built_in, read, write
from nestling.embed.evaluation.results import markdown
from nestling.embed.export.card import measured
from nestling.embed.export.origin import origin_of
from nestling.embed.ladder import Ladder
from nestling.embed.model.body import body_of, linear_layers, merge_low_rank
from nestling.embed.model.fingerprint import fingerprint
from nestling.embed.model.folder import find_adapter
from nestling.embed.model.own import remember
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.errors import AdapterError
from nestling.files.hub import upload
from nestling.options import flag, path, text

LABELLED = ("mean_sts", "mean_ndcg")


@dataclass
class ElasticAdapter:
    """Low-rank changes of an encoder's first layers and a projection for each depth; `ElasticEncoder.train` makes it.

    All sizes write into one space, that of the full model's principal components (or of another teacher's): a prefix
    of any size can be compared with a prefix of equal length of any other.

    Attributes:
        fingerprint: what the model must agree on.
        sizes: the sizes that were trained, and the full one.
        changes: by the name of a linear layer within the layers, such as ``0.attention.self.query``: its low-rank
            factors ``[rank, in]`` and ``[out, rank]``. Numbers are those of fp16, in which they are saved.
        projections: by depth; the full depth's turns the full model's vectors into the space. It is missing where the
            teacher was another one.
        space: checksum of the teacher's weights and the space's basis; vectors of another one cannot be compared.
        info: how it was made: plain JSON values, and under ``measured`` rows for the card.
        base_model: name of the model that it was made for, or "".
        card: the text of its README.md.
    """

    fingerprint: dict[str, Any]
    sizes: Ladder
    changes: dict[str, tuple[Tensor, Tensor]]
    projections: dict[int, Projection]
    space: str
    info: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    card: str = ""

    def __post_init__(self):
        self.changes = {name: (_half(down), _half(up)) for name, (down, up) in self.changes.items()}
        full = self.sizes.full.layers
        self.projections = {
            depth: Projection(turn.encode if depth == full else _half(turn.encode), _half(turn.mean), self.space)
            for depth, turn in sorted(self.projections.items())
        }

    @property
    def depth(self) -> int:
        """The layers of the deepest small size."""
        return max(depth for depth in self.projections if depth < self.sizes.full.layers)

    @property
    def rank(self) -> int:
        """The rank of the changes."""
        return len(next(iter(self.changes.values()))[0])

    def check(self, model: SentenceTransformer) -> None:
        """Whether this is the model that the adapter was made for.

        Raises:
            AdapterError: it is another one, or its weights were changed since.
        """
        own = fingerprint(model)
        if wrong := [f"{key}: {self.fingerprint.get(key)}, here {own[key]}" for key in own
                     if self.fingerprint.get(key) != own[key]]:  # fmt: skip
            name = f" of {self.base_model}" if self.base_model else ""
            raise AdapterError(
                f"the adapter{name} does not fit this model ({'; '.join(wrong)}): load the model that it was trained "
                "on, in float32, with the weights as they were"
            )

    def body(self, model: SentenceTransformer) -> SentenceTransformer:
        """The first layers of the model with the changes in their weights, from which small sizes are read.

        All other tensors are shared with the model, which stays as it is.

        Raises:
            AdapterError: the adapter is another model's.
        """
        self.check(model)
        body = body_of(Encoder.of(model), self.depth)
        layers = linear_layers(body)
        shapes = {name: (list(down.shape)[1], len(up)) for name, (down, up) in self.changes.items()}
        if shapes != {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}:
            odd = sorted(shapes.keys() ^ layers.keys()) or sorted(shapes)
            raise AdapterError(f"the adapter's changes are of other layers than the model's, such as {odd[0]}")
        merge_low_rank(body, self.changes)
        remember(body, {depth: turn for depth, turn in self.projections.items() if depth <= self.depth})
        return body

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter's folder: tensors (fp16), JSON and card. One that is there is replaced, other files stay.

        Raises:
            FileError: it cannot be written, or the folder holds something else.
        """
        full = self.sizes.full.layers
        tensors = {f"layers.{name}.{side}": factor.half() for name, factors in self.changes.items()
                   for side, factor in zip(("down", "up"), factors, strict=True)}  # fmt: skip
        for depth, turn in self.projections.items():
            for name, tensor in turn.state_dict().items():
                tensors[f"projections.{depth}.{name}"] = tensor.cpu() if depth == full else tensor.cpu().half()
        config = {"base_model": self.base_model or None, "model": self.fingerprint, "sizes": str(self.sizes),
                  "space": self.space, "training": self.info}  # fmt: skip
        write(path("folder", folder), config, tensors, self.card)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> ElasticAdapter:
        """Load an adapter from a folder, by the name of one in the package (``minilm``), or from the hub.

        Raises:
            AdapterError: there is none, or its files are damaged.
        """
        config, tensors, card = read(Path(name) if os.path.isdir(name) else os.fspath(name))
        layers = sorted({key[7:].rpartition(".")[0] for key in tensors if key.startswith("layers.")})
        depths = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("projections.")})
        return cls(
            dict(config["model"]), Ladder.parse(config["sizes"]),
            {layer: (tensors[f"layers.{layer}.down"], tensors[f"layers.{layer}.up"]) for layer in layers},
            {d: Projection(tensors[f"projections.{d}.encode"], tensors.get(f"projections.{d}.mean")) for d in depths},
            config["space"], dict(config["training"]), config.get("base_model") or "", card,
        )  # fmt: skip

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the adapter to the hub and return its address.

        Raises:
            AdapterError: the repository cannot be made or written to.
        """
        return upload(
            self.save_pretrained, text("repo_id", repo_id), private=flag("private", private), token=token,
            message="nestling elastic adapter", failure=AdapterError,
        )  # fmt: skip

    def described(self, model: SentenceTransformer) -> ElasticAdapter:
        """The adapter itself, with the card that follows from how it was made and what was measured."""
        rows = self.info.get("measured") or measured(self.sizes, self.info)
        rows = [row for row in rows if len(row) > 1]
        template = jinja2.Template(Path(__file__).with_name("adapter.md.jinja").read_text("utf-8"))
        self.card = template.render(
            base_model=self.base_model, base_id=origin_of(model).base, sizes=self.sizes, model=self.fingerprint,
            rank=self.rank, depth=self.depth, space=self.space, training=self.info,
            labelled=any(name in row for row in rows for name in LABELLED),
            rows=markdown(rows).rstrip() if rows else "",
        ).rstrip() + "\n"  # fmt: skip
        return self


def adapter_for(model: SentenceTransformer, name: Any, asked: Any, sizes: Any) -> ElasticAdapter | None:
    """The adapter of a model that was loaded by that name: the one asked for, or what "auto" finds beside it.

    Raises:
        AdapterError: it cannot be read. One of the package that is not this model's is left out.
    """
    if asked is None or isinstance(asked, ElasticAdapter):
        return asked
    if os.fspath(asked) != "auto":
        return ElasticAdapter.from_pretrained(asked)
    if isinstance(name, nn.Module):
        return None
    if (beside := find_adapter(name)) is not None:
        return ElasticAdapter.from_pretrained(beside)
    if os.fspath(name) not in built_in():
        return None
    found = ElasticAdapter.from_pretrained(os.fspath(name))
    known = {*found.projections, found.sizes.full.layers}
    fits = all(size.layers in known for size in (() if sizes is None else Ladder.parse(sizes)))
    return found if fits and found.fingerprint == fingerprint(model) else None


def space_of(teacher: Mapping[str, Any], basis: Tensor) -> str:
    """The id of the space that a teacher's vectors have in a basis ``[D, d]``."""
    numbers = basis.detach().cpu().float().contiguous().numpy().tobytes()
    return hashlib.sha256(str(teacher["weights"]).encode() + numbers).hexdigest()[:16]


def _half(tensor: Any) -> Any:
    """The numbers that fp16 has, in fp32 on the CPU."""
    return None if tensor is None else tensor.detach().cpu().half().float()
