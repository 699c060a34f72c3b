"""The student of the training: a model whose keys and values are cut to sampled ranks, by masks.

Nothing is stored smaller here. Every key and value is projected onto its first coordinates and back, which gives the
gradients by the bases at the cost of two matmuls of a head's width. The teacher is the same model without projections.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nestling.basis import Cayley
from nestling.checkpoints import TrainingError
from nestling.distill import IGNORED, head_loss
from nestling.kv import attention
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocate import STEP
from nestling.kv.exact import coded
from nestling.kv.files import SIDES

QUERY_BLOCK = 256  # queries at a time beside an exact window: what lies ahead of them or out of the window is left out


class _MaskedLayer(attention.PassThroughLayer):
    """Hands keys, values and what is to be done with them to the attention function."""

    def __init__(self, masked: "Masked"):
        super().__init__()
        self.masked = masked

    def update(self, key_states, value_states, *args, **kwargs):
        self.states = (key_states, value_states)
        return self, self

    def attend(self, module, query, mask, **kwargs):
        return self.masked.attend(module, query, *self.states, mask, **kwargs)


class MaskedBases(nn.Module):
    """Trainable rotations on an adapter's bases, ``[2, L, Hkv, D, D]`` (keys, values), and masks on coordinates.

    Coordinates are ``x @ encode @ U`` with ``U = Cayley(X)``, X = 0 at the start (arXiv 2410.14731, section 3.2, on
    top of any basis). fp32, whatever autocast says.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    free: Tensor

    def __init__(self, adapter: KVAdapter):
        super().__init__()
        for name in ("encode", "decode", "mean"):
            tensors = getattr(adapter, name)
            self.register_buffer(name, torch.stack([tensors[s] for s in SIDES]).float(), persistent=False)
        self.rotation = Cayley(*self.encode.shape)
        # Coordinates of one step are kept or dropped together. To rotate them among each other changes nothing, but
        # Adam would scale the rounding errors of those gradients up to full steps.
        block = torch.arange(self.encode.shape[-1]) // STEP
        self.register_buffer("free", block[:, None] != block, persistent=False)
        self.rotation.x.register_hook(lambda gradient: gradient * self.free)

    def projectors(self, ranks: Tensor) -> Tensor:
        """``encode U mask U^T decode`` for ranks ``[B, 2, L, Hkv]``: ``[B, 2, L, Hkv, D, D]``."""
        with torch.autocast(self.encode.device.type, enabled=False):
            u = self.rotation()
            mask = torch.arange(self.encode.shape[-1], device=ranks.device) < ranks[..., None]
            projectors = (self.encode @ u * mask[..., None, :]) @ (u.mT @ self.decode)
            full = (ranks == mask.shape[-1])[..., None, None]  # the identity, without a gradient
            return torch.where(full, torch.eye(mask.shape[-1], device=u.device, dtype=u.dtype), projectors)

    @torch.no_grad()
    def encodes(self) -> dict[str, Tensor]:
        """The bases as trained so far, fp32 ``[L, Hkv, D, D]`` by side; the rotations are computed in fp64."""
        a = (self.rotation.x - self.rotation.x.mT).double() / 2
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        encode = self.encode.double() @ torch.linalg.solve(eye - a, eye + a)
        return {side: e.float().cpu() for side, e in zip(SIDES, encode, strict=True)}


@dataclass
class Masked:
    """What the attention function is given in a student's forward: projects keys and values of the layers it serves.

    Attributes:
        rows: the row of ``projectors`` of each layer index.
        projectors: ``[B, 2, L, Hkv, D, D]``.
        offsets: ``[B, 2, L, Hkv, D]``, the part of the mean outside of the kept coordinates.
        sinks, window: leading tokens, and most recent ones of every query, that are read exact as in `ExactStore`.
        served: layer indices that came by: a model that drops the argument on its way would train nothing.
        watch: is shown keys or values and what is read of them: (side, row, states, cut), ``[B, Hkv, T, D]`` both.
    """

    rows: dict[int, int]
    projectors: Tensor
    offsets: Tensor
    sinks: int
    window: int
    served: set[int]
    watch: Callable[[int, int, Tensor, Tensor], None] | None = None

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        """Attention output ``[B, Tq, Hq, D]`` of a whole text without padding, causal."""
        row = self.rows.get(module.layer_idx)
        kwargs["dropout"] = 0.0  # as in `Student.train`
        if row is None:
            return attention.sdpa(module, query, key, value, mask, **kwargs)
        self.served.add(module.layer_idx)
        cut = [self._project(x, side, row) for side, x in enumerate((key, value))]
        if not self.sinks and not self.window:
            return attention.sdpa(module, query, cut[0], cut[1], mask, **kwargs)
        blocks = range(0, query.shape[2], QUERY_BLOCK)
        return torch.cat([self._block(module, query, (key, value), cut, start, **kwargs) for start in blocks], 1)

    def _project(self, states: Tensor, side: int, row: int) -> Tensor:
        """Keys (side 0) or values (side 1) ``[B, Hkv, T, D]`` with the coordinates beyond the rank at their mean."""
        projector, offset = self.projectors[:, side, row], self.offsets[:, side, row, :, None]
        cut = states @ projector.to(states.dtype) + offset.to(states.dtype)
        if self.watch is not None:
            self.watch(side, row, states, cut)
        return cut

    def _block(self, module, query: Tensor, exact, cut, start: int, **kwargs) -> Tensor:
        """Queries from ``start`` on: every token behind them is read once, exact or cut."""
        query = query[:, :, start : start + QUERY_BLOCK]
        stop, device = start + query.shape[2], query.device
        i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
        gone = coded(i + 1, self.sinks, self.window)  # these many after the sinks are compressed when i is read
        seen, is_exact = j <= i, (j < self.sinks) | (j >= self.sinks + gone)
        near = torch.cat((j[: self.sinks], j[self.sinks + coded(start + 1, self.sinks, self.window) :]))
        mask = torch.cat(((seen & is_exact)[:, near], seen & ~is_exact), 1)
        keys, values = (torch.cat((e[:, :, near], c[:, :, :stop]), 2) for e, c in zip(exact, cut, strict=True))
        return attention.sdpa(module, query, keys, values, mask[None, None], **kwargs)


class Student(nn.Module):
    """A frozen language model with `MaskedBases`: input ids and ranks to the distillation loss.

    Args:
        model: a causal LM; its weights are not trained unless they require gradients (LoRA).
        adapter: the bases to start from.
        kl_weight, ce_weight: of the distance to the full model, and of the next tokens.
        sinks, window: exact tokens, as the cache that will be used keeps them.
    """

    def __init__(self, model, adapter: KVAdapter, *, kl_weight=1.0, ce_weight=0.0, sinks: int = 0, window: int = 0):
        super().__init__()
        self.lm, self.bases = model, MaskedBases(adapter).to(model.device)
        self.kl_weight, self.ce_weight, self.sinks, self.window = kl_weight, ce_weight, sinks, window
        self.rows = {layer: row for row, layer in enumerate(adapter.fingerprint["layers"])}

    def train(self, mode: bool = True) -> "Student":
        """Training mode (gradient checkpointing asks for it) with dropout off: the bases alone make the difference."""
        super().train(mode)
        for module in self.lm.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        return self

    def state_dict(self, *args, **kwargs):
        """What is trained, and nothing of the frozen model: checkpoints stay small."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    def load_state_dict(self, state_dict, *args, **kwargs):
        """The counterpart: what is not trained is not missed."""
        found = super().load_state_dict(state_dict, strict=False)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return type(found)([name for name in found.missing_keys if name in trained], found.unexpected_keys)

    def masked(self, ranks: Tensor) -> Masked:
        """What the attention function needs for ranks ``[B, 2, L, Hkv]``."""
        return self._masked(self.bases.projectors(ranks))

    def weighted(self, mask: Tensor) -> Masked:
        """The same for a weight of each coordinate, ``[B, 2, L, Hkv, D]``, of the bases as they were given."""
        return self._masked((self.bases.encode * mask[..., None, :]) @ self.bases.decode)

    def _masked(self, projectors: Tensor) -> Masked:
        mean = self.bases.mean
        offsets = mean - (mean[..., None, :] @ projectors)[..., 0, :]
        return Masked(self.rows, projectors, offsets, self.sinks, self.window, set())

    def _arguments(self, masked: Masked) -> dict:
        """How ``masked`` gets to the attention function: in place of keys and values, as a cache hands it over.

        Under gradient checkpointing transformers drops caches; then it travels as an argument, which most models pass
        on to their attention, and the caller checks that they did.
        """
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.lm.modules()):
            return {"use_cache": False, "nested": masked}
        layers = attention.stock_layers(attention.text_config(self.lm))
        for index in self.rows:
            layers[index] = _MaskedLayer(masked)
        return {"use_cache": True, "past_key_values": Cache(layers=layers)}

    @torch.no_grad()
    def teacher(self, input_ids: Tensor) -> Tensor:
        """The full model's last hidden states ``[B, T, H]``."""
        return attention.decoder_and_head(self.lm)[0](input_ids=input_ids, use_cache=False).last_hidden_state

    def hidden(self, input_ids: Tensor, ranks: Tensor) -> Tensor:
        """The last hidden states ``[B, T, H]`` at ranks ``[B, 2, L, Hkv]``.

        Raises:
            UnsupportedModelError: if a layer was not reached.
        """
        masked = self.masked(ranks)
        states = attention.decoder_and_head(self.lm)[0](input_ids=input_ids, **self._arguments(masked))
        if masked.served != set(self.rows):
            raise attention.UnsupportedModelError(
                f"{type(self.lm).__name__} does not hand its arguments down to its attention: train it without "
                "gradient checkpointing"
            )
        return states.last_hidden_state

    def logits(self, input_ids: Tensor, masked: Masked) -> Tensor:
        """The logits ``[B, T, V]`` of the whole model, which may do to them what it likes behind the output map."""
        return self.lm(input_ids=input_ids, **self._arguments(masked)).logits

    @torch.no_grad()
    def divergence(self, input_ids: Tensor, ranks: Tensor, teacher: Tensor) -> Tensor:
        """KL to the full model ``[B]``, mean nats per token, of one text ``[B, T]`` at several ranks.

        Args:
            teacher: the full model's hidden states of the text, ``[1, T, H]``.
        """
        head = attention.decoder_and_head(self.lm)[1]
        rows = self.hidden(input_ids, ranks)
        return torch.stack([head_loss(row, teacher[0], head).kl for row in rows])

    def forward(self, input_ids: Tensor, ranks: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and its parts for ids ``[B, T]`` and ranks ``[B, 2, L, Hkv]``; out of training the loss is the KL.

        Args:
            labels: ``[B, T]`` in step with ``input_ids`` (they are shifted here), `IGNORED` where nothing is learned:
                then only the other positions count. By default the ids themselves. Padding may only be on the right.
        """
        head = attention.decoder_and_head(self.lm)[1]
        student = self.hidden(input_ids, ranks)
        learns_text_alone = self.training and not self.kl_weight
        teacher = student.detach() if learns_text_alone else self.teacher(input_ids)
        targets = torch.full_like(input_ids, IGNORED)
        targets[:, :-1] = (input_ids if labels is None else labels)[:, 1:]
        counted = torch.ones_like(input_ids, dtype=torch.bool) if labels is None else targets != IGNORED
        loss, kl, ce = head_loss(
            student[counted], teacher[counted], head, targets[counted],
            kl_weight=self.kl_weight, ce_weight=self.ce_weight,
        )  # fmt: skip
        if not torch.isfinite(loss):
            raise TrainingError(self._diagnosis(input_ids, ranks))
        return {"loss": loss if self.training else kl, "kl": kl, "ce": ce}

    @torch.no_grad()
    def _diagnosis(self, input_ids: Tensor, ranks: Tensor) -> str:
        """Where numbers stop being finite: in a basis, or after which layer of the teacher or of the student."""
        for side, x in zip(SIDES, self.bases.rotation.x, strict=True):
            bad = ~torch.isfinite(x).flatten(1).all(1)
            if bad.any():
                layers = [layer for layer, row in self.rows.items() if bad[row]]
                return (
                    f"the loss is not finite: the rotation of the {side}s of layer {layers[0]} holds NaN or infinity"
                )
        decoder, _ = attention.decoder_and_head(self.lm)
        for who, extra in (("full model", {"use_cache": False}), ("student", self._arguments(self.masked(ranks)))):
            states = decoder(input_ids=input_ids, output_hidden_states=True, **extra).hidden_states
            for layer, state in enumerate(states):
                if not torch.isfinite(state).all():
                    where = "in the embeddings" if layer == 0 else f"after layer {layer - 1}"
                    return f"the loss is not finite: the {who}'s hidden states hold NaN or infinity {where}"
        return "the loss is not finite, though all hidden states are: the output head gives NaN or infinity"
