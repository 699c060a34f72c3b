"""The version seam of the embedding wing: the parts of a SentenceTransformer, and how it is made shallower.

What depends on the insides of transformers and sentence-transformers is here, in `anatomy` and, for losses, in `bases`
and `cached`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, WeightedLayerPooling
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nestling.embed.anatomy import Anatomy, anatomy_of, depth_of, state_of
from nestling.errors import LadderError, UnsupportedEncoderError


@dataclass(frozen=True)
class Encoder:
    """The parts of a sentence encoder. Make it with `of`.

    Attributes:
        model: the SentenceTransformer itself, without wrappers.
        transformer: its first module.
        backbone: the transformers model inside of that.
        head: the modules that make the embedding from token vectors: pooling and what is trained behind it, but no
            last normalisation, since coordinates are dropped before vectors are normalised.
    """

    model: SentenceTransformer
    transformer: Transformer
    backbone: nn.Module
    head: tuple[nn.Module, ...]
    anatomy: Anatomy

    @classmethod
    def of(cls, model: nn.Module) -> Encoder:
        """The parts of a model, which may be wrapped by DistributedDataParallel or torch.compile.

        Raises:
            UnsupportedEncoderError: it is no sentence encoder, or it has no layers to cut.
        """
        inner = unwrapped(model)
        transformer, head = _parts(inner)
        backbone: nn.Module = transformer.model
        return cls(inner, transformer, backbone, head, anatomy_of(transformer))

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers, first one first."""
        return self.backbone.get_submodule(self.anatomy.layers)  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module | None:
        """What a k-layer model applies to the output of its last layer; None where layers normalise by themselves."""
        return None if self.anatomy.norm is None else self.backbone.get_submodule(self.anatomy.norm)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def dims(self) -> int:
        """Width of the embeddings: of the pooled vector, or of what a Dense makes of it."""
        sized: list[Any] = [module for module in self.head if hasattr(module, "get_embedding_dimension")]
        return (sized or [self.transformer])[-1].get_embedding_dimension()

    def pool(self, features: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """The embedding ``[B, dims]``, not normalised, of token vectors ``[B, T, H]`` of the texts of ``features``."""
        made = {**features, "token_embeddings": tokens}
        for module in self.head:
            made = module(made)
        return made["sentence_embedding"]

    def ended(self, number: int, state: Tensor, last: Tensor) -> Tensor:
        """A layer's output as the model that ends with that layer would return it, ``[B, T, H]``.

        Args:
            number: of the layer, from 1 on.
            state: its output.
            last: token vectors that the model returned, of the same texts. Under mixed precision it is their dtype
                that the weights of the norm have.

        Raises:
            UnsupportedEncoderError: the model changes the length of its texts inside, or hides the layer's gradient.
        """
        kind = type(self.backbone).__name__
        if state.shape != last.shape:
            shapes = f"{list(state.shape)} within and {list(last.shape)} outside"
            raise UnsupportedEncoderError(f"{kind} pads its texts itself: {shapes}")
        if last.requires_grad and not state.requires_grad and self._is_trained(number):
            raise UnsupportedEncoderError(
                f"{kind} hides the gradient of layer {number}, whose weights are trained: "
                'checkpoint with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        norm = self.final_norm
        return state.to(last.dtype) if norm is None else norm(state.to(last.dtype))

    def _is_trained(self, number: int) -> bool:
        return any(parameter.requires_grad for parameter in self.layers[number - 1].parameters())

    @contextmanager
    def cut(self, depth: int) -> Iterator[None]:
        """The model with its first ``depth`` layers only, for as long as the block lasts.

        The list of layers is swapped for a shorter one. So the model's own code runs to its end, with its own masks
        and final norm, and nothing has to be thrown through the wrappers around it: an exception that stops the
        forward early would leave DistributedDataParallel and gradient checkpointing half done. The layers themselves
        stay as they are, so gradients, hooks and recomputation are not touched. Not for several threads at once.
        """
        layers = self.layers
        if depth == len(layers):
            yield
            return
        path, _, name = self.anatomy.layers.rpartition(".")
        owner = self.backbone.get_submodule(path)
        setattr(owner, name, layers[:depth])
        try:
            yield
        finally:
            setattr(owner, name, layers)

    @contextmanager
    def watched(self, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
        """Outputs of the layers ``wanted`` (1 is the first), collected while the block lasts: ``[B, T, H]`` each."""
        states: dict[int, Tensor] = {}

        def keep(number: int):
            def hook(module, args, output):
                states[number] = state_of(output)

            return hook

        handles = [self.layers[number - 1].register_forward_hook(keep(number)) for number in sorted(wanted)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def unwrapped(model: nn.Module) -> SentenceTransformer:
    """The SentenceTransformer within DistributedDataParallel (``module``) and torch.compile (``_orig_mod``).

    Raises:
        UnsupportedEncoderError: there is none, or it is replicated within one process.
    """
    inner: Any = model
    while not isinstance(inner, SentenceTransformer):
        if isinstance(inner, nn.DataParallel):
            raise UnsupportedEncoderError(
                "DataParallel runs copies of the model in threads, whose layers cannot be read apart: "
                "start one process per device (torchrun), or make one device visible"
            )
        found = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if found is None:
            kind = type(inner).__name__
            raise UnsupportedEncoderError(f"expected a SentenceTransformer, got {kind}: wrap the model in one")
        inner = found
    return inner


def truncated_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """A copy of the config for the model of the first ``depth`` layers; lists with an entry per layer are cut too.

    Raises:
        UnsupportedEncoderError: it names no number of layers.
        ValueError: the model has fewer layers than that.
    """
    full = depth_of(config)
    if not 1 <= depth <= full:
        raise LadderError(f"cannot keep {depth} of {full} layers: expected 1 to {full}")
    config = copy.deepcopy(config)
    text = config.get_text_config()
    per_layer = {
        name: value[:depth]
        for name, value in vars(text).items()
        if ("layer" in name or name == "attention_window") and isinstance(value, list | tuple) and len(value) == full
    }
    for name, value in {"num_hidden_layers": depth, **per_layer}.items():
        setattr(text, name, value)
    return config


def _parts(model: SentenceTransformer) -> tuple[Transformer, tuple[nn.Module, ...]]:
    """The transformer and the modules behind it, without a last normalisation."""
    transformer, *head = model.children()
    while head and isinstance(head[-1], Normalize):
        head.pop()
    if not isinstance(transformer, Transformer):
        raise UnsupportedEncoderError(f"the model starts with a {type(transformer).__name__}: it has no layers to cut")
    output = transformer.modality_config.get("text", {}).get("method_output_name")
    if transformer.module_output_name != "token_embeddings" or output not in ("last_hidden_state", None):
        raise UnsupportedEncoderError("the model's transformer does not end in token vectors that can be pooled")
    if not head or any(isinstance(module, WeightedLayerPooling) for module in head):
        raise UnsupportedEncoderError("the model needs a pooling of its last layer behind its transformer")
    return transformer, tuple(head)
