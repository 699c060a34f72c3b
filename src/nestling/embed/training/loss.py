"""StarbucksLoss: one encoder is trained at every size at once, and each size follows a larger one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _create_minibatch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.taps import taps
from nestling.embed.training.base_losses import Batches, cached_value, caches_gradients, value
from nestling.embed.training.config import LossConfig
from nestling.embed.training.lengths import embed_by_length, gathered
from nestling.embed.training.teacher import checked_teacher, rows_of
from nestling.errors import OptionError
from nestling.losses import similarity_kl
from nestling.options import flag

Parts = dict[str, Tensor]


class StarbucksLoss(CachedLossMixin, nn.Module):
    """A sentence-transformers loss at every size of a ladder, on every step, from one embedding of each text.

    At each size the pooled vectors of its depth are cut to its first dims, normalised, and given to ``loss``; a KL
    divergence lets small sizes follow the full one (representation learning of arXiv 2410.13230, SRL):

        L = sum over sizes w_c * (loss(c) + kl_weight * KL(teacher || c)),   no KL for the full size.

    Args:
        model: the SentenceTransformer that is trained.
        loss: any loss of the same model that has ``compute_loss_from_embeddings`` (MultipleNegativesRankingLoss,
            CoSENTLoss, AnglELoss, MarginMSELoss, DistillKLDivLoss, TripletLoss, ...), or one that caches gradients by
            ``CachedLossMixin`` (CachedMultipleNegativesRankingLoss): the embeddings of all sizes are cached together.
            None, with a teacher: the sizes follow it and nothing else.
        cups: a `Ladder`, or what `Ladder.parse` takes; the full model must be in it.
        config: weights, temperature and the rest. The KL is between softmaxes of each query's similarities to all
            other columns of the batch; sizes weigh 1 unless ``weights`` names them (``"full"`` is the full one).
            Without ``normalize`` the loss and the KL see vectors as they are, for dot products; with it a loss of
            distances needs a margin for unit vectors (TripletLoss's default of 5 is out of their reach).
        projections: ``{depth: Projection}``, applied to pooled vectors before they are cut; parameters of the loss.
        teacher: embeddings ``[N, D]`` of the training texts by another model, of any width, on any device or mapped
            from a file. It replaces the full size as the teacher, and teaches the full size too. Labels are then row
            numbers ``[B, columns]``: a dataset column ``label`` of lists of integers, one for each text column, gets
            there with SentenceTransformerTrainer as it is. ``loss`` must be one that needs no labels of its own.
        gather_across_devices: each process computes the loss and the KL of the texts of all processes, as one process
            with their batches together would. Batches must be of one size; leave the option of this name off in
            ``loss``. Without it the KL ranks the texts of one process.

    Returns:
        From ``forward``, a dict of scalars whose sum is the loss: ``"6x128"`` and ``"kl_6x128"`` for every size, with
        their weights. SentenceTransformerTrainer adds them up and logs each.

    Raises:
        LadderError: the sizes do not fit the model.
        UnsupportedEncoderError: the model has no layers to cut.
        ValueError: an option is out of range, or the loss cannot be taken at several sizes. From ``forward``, if
            labels do not suit the loss or the teacher.

    The released retrieval code of the paper is ``temperature=1, normalize=False`` around a loss of dot products.
    """

    loss: Any
    mini_batch_size: Any  # these two are the cached base loss's own
    mini_batch_num_tokens: Any

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module | None,
        cups: Ladder | str | Iterable[Any],
        config: LossConfig | None = None,
        *,
        projections: Mapping[int, Projection] | None = None,
        teacher: Tensor | np.ndarray | None = None,
        gather_across_devices: bool = False,
    ):
        super().__init__()
        config = LossConfig.of(config)
        encoder = Encoder.of(model)
        self.cups = Ladder.parse(cups).check(encoder.depth, encoder.dims)
        self.uses_gradient_cache = loss is not None and caches_gradients(loss)
        self.model, self.loss = model, loss
        self.gather_across_devices = flag("gather_across_devices", gather_across_devices)
        if self.uses_gradient_cache:
            self.mini_batch_size, self.mini_batch_num_tokens = (
                self.loss.mini_batch_size,
                self.loss.mini_batch_num_tokens,
            )
        self.cascade, self.normalize = config.cascade, config.normalize
        self.kl_weight, self.temperature = config.kl_weight, config.temperature
        full = self.cups.full
        named = {full if name == "full" else self.cups.named(name): w for name, w in (config.weights or {}).items()}
        self.weights = {size: named.get(size, 1.0) for size in self.cups}
        self.projections = nn.ModuleDict({str(depth): projection for depth, projection in (projections or {}).items()})
        # Not a buffer: a table of all texts need not be on the model's device, nor in memory.
        self.teacher = None if teacher is None else checked_teacher(teacher)
        self._check()
        self.teachers = self._who_teaches()
        # A text is represented by the vectors of all depths side by side, each as wide as its widest size.
        self.widths = {depth: max(c.dims for c in self.cups if c.layers == depth) for depth in self.cups.layers}

    def _check(self) -> None:
        for depth, projection in self.projections.items():
            size = len(projection.get_parameter("encode"))
            if int(depth) not in self.cups.layers or size != self.cups.full.dims:
                raise OptionError(f"no size of {self.cups} takes a projection of {size} coordinates at depth {depth}")
        if self.teacher is not None and not self.kl_weight:
            raise OptionError("kl_weight=0 with a teacher: nothing follows it, leave it out or give a weight above 0")
        if self.loss is None and self.teacher is None:
            raise OptionError("without a loss nothing holds the full size where it is: give a loss, or a teacher")
        if self.gather_across_devices and getattr(self.loss, "gather_across_devices", False):
            raise OptionError("texts would be gathered twice: leave gather_across_devices off in the inner loss")

    def _who_teaches(self) -> dict[Size, Size | None]:
        """The teacher of each size that has one; None is the external one."""
        if not self.kl_weight:
            return {}
        *small, full = self.cups
        external = self.teacher is not None
        if self.cascade:
            larger = {one: [size for size in self.cups if size > one and size.dims >= one.dims] for one in small}
            found: dict[Size, Size | None] = {one: sizes[0] for one, sizes in larger.items()}
        else:
            found = {size: None if external else full for size in small}
        return found | ({full: None} if external else {})

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Parts:
        """The parts of the loss for columns of texts, as ``model.preprocess`` makes them, and labels for ``loss``."""
        columns = list(sentence_features)
        if not self.uses_gradient_cache:
            made = embed_by_length(self.represent, columns)
            return self._parts(*self._gathered([[column] for column in made], labels), False)
        total = self.forward_cached(columns, labels)
        # The total carries the hook that sends the cached gradients into the model: it must be in the sum, once.
        name, part = next(iter(self._cached_parts.items()))
        return {**self._cached_parts, name: part + (total - total.detach())}

    def represent(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """The vectors of all depths side by side ``[B, S]``, where losses expect the embedding."""
        projections = {int(depth): projection for depth, projection in self.projections.items()}
        vectors = taps(self.model, features, self.widths, projections)
        cut = [vectors[depth][:, :width] for depth, width in self.widths.items()]
        return {"sentence_embedding": torch.cat(cut, 1)}

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Texts ``begin`` to ``end`` of a column, the second time with the random state of the first (dropout): what
        sentence-transformers calls to cache gradients (arXiv 2101.06983), of all depths in place of one embedding.
        """
        features = _create_minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*features.values()) if copy_random_state else None
            return self.represent(features)["sentence_embedding"], state

    def calculate_loss(self, reps: Batches, labels: Tensor | None = None, *, with_backward: bool = False) -> Tensor:
        """The whole loss of a batch from representations; with ``with_backward``, their gradients are set already."""
        reps, labels = self._gathered(reps, labels)
        # Gathered vectors were computed from the ones whose gradients are cached: they are put between, as leaves.
        own = [batches[0] for batches in reps] if self.gather_across_devices and with_backward else []
        used = [[vectors.detach().requires_grad_()] for vectors in own] or reps
        self._cached_parts = {k: v.detach() for k, v in self._parts(used, labels, with_backward).items()}
        if own:
            torch.autograd.backward(own, [leaf.grad for (leaf,) in used])
        return torch.stack(list(self._cached_parts.values())).sum()

    def _parts(self, reps: Batches, labels: Tensor | None, with_backward: bool) -> Parts:
        parts: Parts = {}
        columns = [torch.cat(batches) for batches in reps]
        own_labels = labels if self.teacher is None else None
        for size in self.cups:
            parts |= self._task(size, reps, own_labels, with_backward)
            if size in self.teachers:
                kl = self.weights[size] * self.kl_weight * self._divergence(size, columns, labels)
                parts[f"kl_{size.name}"] = kl
        if with_backward and self.teachers:
            torch.stack([value for value in parts.values() if value.requires_grad]).sum().backward()
        return parts

    def _gathered(self, reps: Batches, labels: Tensor | None) -> tuple[Batches, Tensor | None]:
        """Representations and labels of all processes, if they are wanted."""
        if not self.gather_across_devices:
            return reps, labels
        return [[gathered(torch.cat(batches))] for batches in reps], None if labels is None else gathered(labels)

    def _task(self, size: Size, reps: Batches, labels: Tensor | None, with_backward: bool) -> Parts:
        """The base loss at a size, with its weight."""
        if self.loss is None:
            return {}
        vectors = [[self._coordinates(rep, size) for rep in batches] for batches in reps]
        weight = self.weights[size]
        if self.uses_gradient_cache:
            return {size.name: weight * cached_value(self.loss, vectors, labels, weight, with_backward)}
        found = value(self.loss, [batches[0] for batches in vectors], labels)
        named = found.items() if isinstance(found, dict) else [("", found)]
        return {f"{size.name}_{name}".rstrip("_"): weight * part for name, part in named}

    def _divergence(self, size: Size, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        """KL of a size to its teacher."""
        student = [self._coordinates(column, size) for column in columns]
        by = self.teachers[size]
        if by is not None:
            teacher = [self._coordinates(column, by).detach() for column in columns]
        else:
            teacher = rows_of(cast(Tensor, self.teacher), labels, student)
        return similarity_kl(teacher, student, self.temperature)

    def _coordinates(self, representation: Tensor, size: Size) -> Tensor:
        """A size's vectors ``[B, d]`` out of representations ``[B, S]``, in fp32 or wider."""
        start = sum(width for depth, width in self.widths.items() if depth < size.layers)
        vectors = representation[:, start : start + size.dims]
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return unit(vectors, dim=-1) if self.normalize else vectors

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of this loss."""
        config: dict[str, Any] = {"loss": self.loss, "cups": str(self.cups), "kl_weight": self.kl_weight}
        if self.kl_weight:
            config |= {"temperature": self.temperature, "cascade": self.cascade}
        config["weights"] = {size.name: weight for size, weight in self.weights.items() if weight != 1.0}
        config["projected_layers"] = sorted(int(depth) for depth in self.projections)
        return config | {"normalize": self.normalize, "external_teacher": self.teacher is not None}

    @property
    def citation(self) -> str:
        return """
@misc{zhuang2024starbucks,
    title={Starbucks: Improved Training for 2D Matryoshka Embeddings},
    author={Shengyao Zhuang and Shuai Wang and Bevan Koopman and Guido Zuccon},
    year={2024},
    eprint={2410.13230},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""
