"""The student of the training: a model whose keys and values are cut to sampled ranks or bits, by masks.

The masks are in `nestling.kv.simulation.projections`. The teacher is the same model without them.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nestling.errors import TrainingError, UnsupportedModelError
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import SIDES
from nestling.kv.integration.attach import attach, cached, decoder_and_head, input_device, stock_layers, text_config
from nestling.kv.simulation.projections import Masked, MaskedBases, MaskedLayer
from nestling.losses import IGNORED, head_loss


class Student(nn.Module):
    """A frozen language model with `MaskedBases`: input ids and bits to the distillation loss.

    Args:
        model: a causal LM; its weights are not trained unless they require gradients (LoRA).
        adapter: the bases to start from.
        kl_weight, ce_weight: of the distance to the full model, and of the next tokens.
        sinks, window: exact tokens, as the cache that will be used keeps them.
    """

    def __init__(self, model, adapter: KVAdapter, *, kl_weight=1.0, ce_weight=0.0, sinks: int = 0, window: int = 0):
        super().__init__()
        attach(model)
        self.lm, self.bases = model, MaskedBases(adapter).to(input_device(model))
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
        report = super().load_state_dict(state_dict, strict=False)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return type(report)([name for name in report.missing_keys if name in trained], report.unexpected_keys)

    def masked(self, bits: Tensor) -> Masked:
        """What the attention function needs for bits of blocks, ``[B, 2, L, Hkv, blocks]``."""
        return self.reading(self.bases.cut(bits))

    def weighted(self, mask: Tensor) -> Masked:
        """The same for a weight of each coordinate, ``[B, 2, L, Hkv, D]``, of the bases as they were given."""
        return self.reading(self.bases.weighted(mask))

    def reading(self, cut: Callable[[Tensor, int, int, Tensor], Tensor]) -> Masked:
        """The same for any way to read keys and values, see `Masked`."""
        return Masked(self.rows, cut, self.sinks, self.window, set())

    def _arguments(self, masked: Masked) -> dict:
        """How ``masked`` gets to the attention function: in place of keys and values, as a cache hands it over.

        Under gradient checkpointing transformers drops caches; then it travels as an argument, which most models pass
        on to their attention, and the caller checks that they did.
        """
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.lm.modules()):
            return {"use_cache": False, "nested": masked}
        layers = stock_layers(text_config(self.lm))
        for index in self.rows:
            layers[index] = MaskedLayer(masked)
        return {"use_cache": True, **cached(self.lm, Cache(layers=layers))}

    @torch.no_grad()
    def teacher(self, input_ids: Tensor, **options) -> Tensor:
        """The full model's last hidden states ``[B, T, H]``."""
        return decoder_and_head(self.lm)[0](input_ids=input_ids, use_cache=False, **options).last_hidden_state

    def hidden(self, input_ids: Tensor, bits: Tensor) -> Tensor:
        """The last hidden states ``[B, T, H]`` at bits of blocks ``[B, 2, L, Hkv, blocks]``.

        Raises:
            UnsupportedModelError: if a layer was not reached.
        """
        return self._hidden(input_ids, self.masked(bits))

    def _hidden(self, input_ids: Tensor, masked: Masked, **options) -> Tensor:
        states = decoder_and_head(self.lm)[0](input_ids=input_ids, **options, **self._arguments(masked))
        if masked.served != set(self.rows):
            raise UnsupportedModelError(
                f"{type(self.lm).__name__} does not hand its arguments down to its attention: train it without "
                "gradient checkpointing"
            )
        return states.last_hidden_state

    def logits(self, input_ids: Tensor, masked: Masked, first: int = 0, tokens: Tensor | None = None) -> Tensor:
        """The logits ``[B, T, V]`` of the whole model, which may do to them what it likes behind the output map.

        Args:
            first: position of the first token, where the model can be told.
            tokens: of which tokens, where the model can be told; by default of all.
        """
        options = self._arguments(masked)
        accepted = inspect.signature(self.lm.forward).parameters
        if first and "position_ids" in accepted:
            masked.positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            options["position_ids"] = masked.positions.expand(input_ids.shape)
        if tokens is not None and "logits_to_keep" in accepted:
            options["logits_to_keep"] = tokens
        return self.lm(input_ids=input_ids, **options).logits

    @torch.no_grad()
    def watched(self, input_ids: Tensor, watch: Sequence[Callable], first: int = 0) -> None:
        """Show keys and values of the full model, as `Masked` does; ``first`` as of `logits`."""
        masked = self.weighted(torch.ones(len(input_ids), *self.bases.mean.shape, device=input_ids.device))
        masked.watch = watch
        self.logits(input_ids, masked, first, torch.zeros(1, dtype=torch.long, device=input_ids.device))

    @torch.no_grad()
    def divergence(self, input_ids: Tensor, bits: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        """KL to the full model ``[B]``, mean nats per token, of one text ``[B, T]`` at several allocations' bits.

        Args:
            teacher: the full model's hidden states of the text, ``[1, T, H]``.
            tokens: the numbers of those that count; by default all.
        """
        head = decoder_and_head(self.lm)[1]
        rows = self.hidden(input_ids, bits)
        if tokens is not None:
            rows, teacher = (states[:, tokens.to(states.device)] for states in (rows, teacher))
        return torch.stack([head_loss(row, teacher[0], head).kl for row in rows])

    def distance(
        self, input_ids: Tensor, masked: Masked, tokens: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """KL to the full model of texts ``[B, T]``, mean nats per token, with a gradient by what ``masked`` reads.

        Args:
            tokens: the numbers of those that count; by default all.
            positions: of the tokens, ``[T]``, where the model can be told; by default from 0 on.
        """
        decoder, head = decoder_and_head(self.lm)
        options = {}
        if positions is not None and "position_ids" in inspect.signature(decoder.forward).parameters:
            # Without a mask transformers takes positions with gaps for several texts in a row.
            masked.positions = positions
            options = {"position_ids": positions.expand(input_ids.shape), "attention_mask": torch.ones_like(input_ids)}
        student, teacher = (
            (states if tokens is None else states[:, tokens.to(states.device)]).flatten(0, 1)
            for states in (self._hidden(input_ids, masked, **options), self.teacher(input_ids, **options))
        )
        return head_loss(student, teacher, head).loss

    def forward(self, input_ids: Tensor, bits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and its parts for ids ``[B, T]`` and bits of blocks ``[B, 2, L, Hkv, blocks]``.

        Out of training the loss is the KL.

        Args:
            labels: ``[B, T]`` in step with ``input_ids`` (they are shifted here), `IGNORED` where nothing is learned:
                then only the other positions count. By default the ids themselves. Padding may only be on the right.
        """
        head = decoder_and_head(self.lm)[1]
        student = self.hidden(input_ids, bits)
        learns_text_alone = self.training and not self.kl_weight
        teacher = student.detach() if learns_text_alone else self.teacher(input_ids)
        targets = torch.full_like(input_ids, IGNORED)
        targets[:, :-1] = (input_ids if labels is None else labels)[:, 1:]
        counted = torch.ones_like(input_ids, dtype=torch.bool) if labels is None else targets != IGNORED
        counted = counted.to(student.device)
        loss, kl, ce = head_loss(
            student[counted], teacher[counted], head, targets.to(student.device)[counted],
            kl_weight=self.kl_weight, ce_weight=self.ce_weight,
        )  # fmt: skip
        if not torch.isfinite(loss):
            raise TrainingError(self._diagnosis(input_ids, bits))
        return {"loss": loss if self.training else kl, "kl": kl, "ce": ce}

    @torch.no_grad()
    def _diagnosis(self, input_ids: Tensor, bits: Tensor) -> str:
        """Where numbers stop being finite: in a basis, or after which layer of the teacher or of the student."""
        for side, x in zip(SIDES, self.bases.rotation.x, strict=True):
            bad = ~torch.isfinite(x).flatten(1).all(1)
            if bad.any():
                layers = [layer for layer, row in self.rows.items() if bad[row]]
                return (
                    f"the loss is not finite: the rotation of the {side}s of layer {layers[0]} holds NaN or infinity"
                )
        decoder, _ = decoder_and_head(self.lm)
        for who, extra in (("full model", {"use_cache": False}), ("student", self._arguments(self.masked(bits)))):
            states = decoder(input_ids=input_ids, output_hidden_states=True, **extra).hidden_states
            for layer, state in enumerate(states):
                if not torch.isfinite(state).all():
                    where = "in the embeddings" if layer == 0 else f"after layer {layer - 1}"
                    return f"the loss is not finite: the {who}'s hidden states hold NaN or infinity {where}"
        return "the loss is not finite, though all hidden states are: the output head gives NaN or infinity"
