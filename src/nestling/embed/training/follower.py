"""What a distillation trains: low-rank changes of the first layers, a map at each depth, and how far they are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, pad

from nestling.embed.ladder import Ladder
from nestling.embed.model.body import add_low_rank, body_of
from nestling.embed.model.encode import encode
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import RIDGE, Projection
from nestling.embed.model.taps import token_taps

KL_SHARE = 0.5  # weight of the KL of similarities beside the cosine, at kl_weight = 1
SHARPNESS, SHARPNESS_RATE = 0.6, 5e-3  # of a size's similarities in that KL, at the start, and its learning rate


class Follower:
    """A body with changes of low rank, and maps from the vector of each depth to the teacher's principal coordinates.

    A small size is less sure of who is near than the teacher. Its similarities have a sharpness of their own in the
    KL, for otherwise vectors would get a large part in common, which softens them as well, and would leave the space.

    Attributes:
        body: the first layers, as a model that can be measured as it is.
        changes: by the layer's name.
        projections: by depth.
        sharpness: by size, a logarithm; of the training alone.
    """

    def __init__(self, encoder: Encoder, small: Ladder, rank: int, seed: int):
        """
        Args:
            small: the sizes that are trained; maps of full width follow at every depth of them too.
        """
        self.small, self.depths, self.dims = small, small.layers, encoder.dims
        self.body = body_of(encoder, max(self.depths))
        self.changes = add_low_rank(self.body, rank, seed)
        self.projections: dict[int, Projection] = {}
        start = torch.tensor(SHARPNESS).log()
        self.sharpness = {name: torch.nn.Parameter(start.clone().to(self.body.device))
                          for depth in self.depths for name in self._widths(depth).values()}  # fmt: skip

    def _widths(self, depth: int) -> dict[int, str]:
        """The widths that are trained at a depth, its sizes' own and the full one, with their sizes' names."""
        return {size.dims: size.name for size in self.small if size.layers == depth} | {
            self.dims: f"{depth}x{self.dims}"
        }

    @torch.no_grad()
    def align(self, texts: Sequence[str], prompt: str, wanted: Tensor, autocast: Callable[[], Any]) -> None:
        """Start the maps at ridge regressions of coordinates ``wanted`` ``[n, H]`` on each depth's vectors."""
        with autocast():
            found = encode(self.body, texts, dict.fromkeys(self.depths, self.dims), prompt=prompt, batch_size=64)
        for depth, vectors in found.items():
            self.projections[depth] = _regression(vectors.double(), wanted.double()).to(self.body.device)
            self.projections[depth].requires_grad_(True)

    def blank(self) -> None:
        """Maps of the right shapes, for a state that is put back."""
        for depth in self.depths:
            turn = Projection(torch.eye(self.dims), torch.zeros(self.dims)).to(self.body.device)
            self.projections[depth] = turn.requires_grad_(True)

    def groups(self, rate: float, map_rate: float) -> list[dict[str, Any]]:
        """The parameters with their peak learning rates, as an optimiser takes them."""
        changes = [factor for change in self.changes.values() for factor in (change.down, change.up)]
        maps = [parameter for turn in self.projections.values() for parameter in turn.parameters()]
        sharpness = {"params": list(self.sharpness.values()), "lr": SHARPNESS_RATE, "weight_decay": 0.0}
        return [{"params": changes, "lr": rate}, {"params": maps, "lr": map_rate}, sharpness]

    def tensors(self) -> dict[str, Tensor]:
        """All that is trained, by name, as copies on the CPU."""
        found = {f"layers.{name}.{side}": getattr(change, side)
                 for name, change in self.changes.items() for side in ("down", "up")}  # fmt: skip
        for depth, turn in self.projections.items():
            found |= {f"projections.{depth}.{name}": value for name, value in turn.named_parameters()}
        found |= {f"sharpness.{name}": value for name, value in self.sharpness.items()}
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, change in self.changes.items():
            for side in ("down", "up"):
                getattr(change, side).copy_(tensors[f"layers.{name}.{side}"])
        for depth, turn in self.projections.items():
            for name, value in turn.named_parameters():
                value.copy_(tensors[f"projections.{depth}.{name}"])
        for name, value in self.sharpness.items():
            value.copy_(tensors[f"sharpness.{name}"])

    def losses(
        self, texts: Sequence[str], prompt: str, target: Tensor, basis: Tensor, config: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss of each width of each depth, by its size's name; their sum is the loss.

        For each it is 1 - cosine to the prefix of the target's coordinates, and KL_SHARE times ``kl_weight`` times the
        KL of the similarities within the batch to those of the whole target.

        Args:
            target: unit vectors ``[B, D]`` of the texts by the teacher.
            basis: ``[D, H]``, to its principal coordinates.
        """
        encoder = Encoder.of(self.body)
        device = self.body.device
        features = batch_to_device(self.body.preprocess(list(texts), prompt=prompt or None), device)
        with autocast():
            tokens = token_taps(self.body, features, self.depths)
        target = target.to(device)
        wanted, likeness = target @ basis.to(device), _log_likeness(target, config.temperature)
        found = {}
        for depth, states in tokens.items():
            vectors = self.projections[depth](encoder.pool(features, states.float()))
            widths = self._widths(depth)
            for width, name in widths.items():
                unit = normalize(vectors[:, :width], dim=-1)
                off = 1 - (unit * normalize(wanted[:, :width], dim=-1)).sum(-1).mean()
                own = _log_likeness(unit, config.temperature, self.sharpness[name].exp())
                kl = (likeness.exp() * (likeness - own)).sum(-1).mean()
                weight = (config.weights or {}).get(name, 1.0) / len(widths)
                found[name] = weight * (off + KL_SHARE * config.kl_weight * kl)
        return found


def coordinates(target: Tensor, dims: int) -> Tensor:
    """A basis ``[D, dims]`` of the principal coordinates of unit vectors ``[n, D]``, not centred, most telling first.

    Where there are fewer coordinates than dims, the rest are zero.
    """
    vectors = target.double()
    basis = torch.linalg.eigh(vectors.mT @ vectors / len(vectors))[1].flip(-1)[:, :dims]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # signs that do not hang on the library
    return pad(basis * largest.sign(), (0, dims - basis.shape[1])).float()


def _log_likeness(unit: Tensor, temperature: float, sharpness: Tensor | float = 1.0) -> Tensor:
    """Log-softmax of each vector's similarities to the others, ``[B, B]``."""
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return log_softmax((unit @ unit.mT * (sharpness / temperature)).masked_fill(itself, -1e4), -1)


def _regression(vectors: Tensor, wanted: Tensor) -> Projection:
    """``wanted ~ (vectors - mean) @ encode`` by ridge regression.

    The mean is not the vectors' own but lies beside it in the direction in which they vary least, as far as they
    vary in all: so there is a direction from which the mean of ``wanted`` is written.
    """
    inputs = vectors - vectors.mean(0)
    covariance = inputs.mT @ inputs / len(inputs)
    aside = torch.linalg.eigh(covariance)[1][:, 0] * covariance.diagonal().sum().clamp_min(1e-12).sqrt()
    inputs = inputs + aside
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(1e-12)
    moment = covariance + torch.outer(aside, aside) + ridge * torch.eye(len(covariance)).to(covariance)
    encode = torch.linalg.solve(moment, inputs.mT @ wanted / len(inputs))
    return Projection(encode.contiguous(), vectors.mean(0) - aside)  # in rows, as a state that is put back has it
