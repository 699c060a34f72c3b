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

from nestling.embed.model.copies import copied, copied_path, copied_tree, descend, plain
from nestling.embed.model.layers import Anatomy, anatomy_of, depth_of, state_of
from nestling.errors import LadderError, OptionError, UnsupportedEncoderError


@dataclass(frozen=True)
class Encoder:
    """The parts of a sentence encoder. Make it with `of`.

    Attributes:
        outer: the model as it was given, perhaps wrapped.
        model: the SentenceTransformer itself, without wrappers.
        transformer: its first module.
        backbone: the transformers model inside of that.
        head: the modules that make the embedding from token vectors: pooling and what is trained behind it, but no
            last normalisation, since coordinates are dropped before vectors are normalised.
    """

    outer: nn.Module
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
        return cls(model, inner, transformer, plain(transformer.model), head, anatomy_of(transformer))

    def evaluating(self) -> Encoder:
        """The encoder in eval mode: a copy that shares its weights. The modes of the model itself stay as they are."""
        inner = copied_tree(self.model).eval()
        transformer, head = _parts(inner)
        return Encoder(inner, inner, transformer, plain(transformer.model), head, self.anatomy)

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers, first one first."""
        return descend(self.backbone, self.anatomy.layers)  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module | None:
        """What a k-layer model applies to the output of its last layer; None where layers normalise by themselves."""
        return None if self.anatomy.norm is None else descend(self.backbone, self.anatomy.norm)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Width of the pooled vector, or of what a Dense makes of it."""
        sized: list[Any] = [module for module in self.head if hasattr(module, "get_embedding_dimension")]
        return (sized or [self.transformer])[-1].get_embedding_dimension()

    @property
    def dims(self) -> int:
        """Width of the model's embeddings: the first of those coordinates, if it has a ``truncate_dim``.

        Raises:
            UnsupportedEncoderError: it keeps none.
        """
        kept = self.model.truncate_dim
        if kept is not None and kept < 1:
            raise UnsupportedEncoderError(f"the model has truncate_dim={kept}: expected 1 to {self.width}, or None")
        return self.width if kept is None else min(self.width, kept)

    def pool(self, features: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """The embedding ``[B, dims]``, not normalised, of token vectors ``[B, T, H]`` of the texts of ``features``."""
        made = {**features, "token_embeddings": tokens}
        for module in self.head:
            made = module(made)
        return made["sentence_embedding"][:, : self.dims]

    def check_length(self, features: Mapping[str, Any]) -> None:
        """Whether the model has positions for the longest of some texts.

        Raises:
            OptionError: its ``max_seq_length`` lets texts through that are longer.
        """
        limit, mask = self.anatomy.positions, features.get("attention_mask")
        if limit is None or mask is None or mask.shape[-1] <= limit:
            return
        count = int(mask.sum(-1).max())
        if count > limit:
            raise OptionError(
                f"max_seq_length={self.model.max_seq_length} lets through a text of {count} tokens, and the model has "
                f"{limit} positions: set model.max_seq_length = {limit}, as load_encoder does"
            )

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

    def shortened(self, depth: int) -> Transformer:
        """The transformer with its first ``depth`` layers only: a copy that shares their weights."""
        copies = copied_path(self.transformer, ["model", *self.anatomy.layers.split(".")])
        _keep(copies[-1], depth)
        return copies[0]  # type: ignore[return-value]

    @contextmanager
    def running(self, depth: int, wanted: set[int]) -> Iterator[tuple[nn.Module, dict[int, Tensor]]]:
        """The model as it was given, wrappers and all, with its first ``depth`` layers, and what these return.

        Inside of the wrappers it is a copy of the modules on the way to the layers, whose list is shorter. So the
        model's own code runs to its end, with its own masks and final norm, and nothing has to be thrown through the
        wrappers: an exception that stops the forward early would leave DistributedDataParallel and gradient
        checkpointing half done. Weights are shared, so gradients are those of the model; the model itself is not
        touched, so that other threads may use it.

        Yields:
            The copy, and a dict that collects the outputs ``[B, T, H]`` of the layers ``wanted`` (1 is the first) as
            it runs.
        """
        states: dict[int, Tensor] = {}

        def keep(number: int):
            def hook(module, args, output):
                states[number] = state_of(output)

            return hook

        first = next(iter(self.model._modules))
        copies = copied_path(self.model, [first, "model", *self.anatomy.layers.split(".")])
        inner, layers = copies[0], copies[-1]
        _keep(layers, depth)
        _ask_for_nothing(copies)
        handles = [layers.get_submodule(str(n - 1)).register_forward_hook(keep(n)) for n in sorted(wanted)]
        try:
            with _wrapping(self.outer, inner) as runs:
                yield runs, states
        finally:  # a layer that is checkpointed runs again in the backward pass
            for handle in handles:
                handle.remove()


def _keep(layers: Any, depth: int) -> None:
    """Cut a list of layers, and make it one of copies, which can be given hooks."""
    layers._modules = {str(number): copied(plain(layer)) for number, layer in enumerate(list(layers)[:depth])}


def _ask_for_nothing(copies: list[nn.Module]) -> None:
    """Let no config ask for hidden states or attentions: transformers would put hooks for them into shared modules."""
    for module in copies:
        if (config := vars(module).get("config")) is not None:
            vars(module)["config"] = config = copy.copy(config)
            config.output_hidden_states = config.output_attentions = False


@contextmanager
def _wrapping(outer: Any, inner: nn.Module) -> Iterator[nn.Module]:
    """What wraps a SentenceTransformer, wrapping another one while the block lasts, and uncompiled.

    Wrappers are not copied, since DistributedDataParallel keeps its state from one forward to the next.
    """
    if isinstance(plain(outer), SentenceTransformer):
        yield inner
        return
    wrapper = plain(outer)
    child, compiled = wrapper._modules["module"], wrapper._compiled_call_impl
    with _wrapping(child, inner) as runs:
        wrapper._modules["module"], wrapper._compiled_call_impl = runs, None
        try:
            yield wrapper
        finally:
            wrapper._modules["module"], wrapper._compiled_call_impl = child, compiled


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
    if any(getattr(module, "module_output_name", None) == "token_embeddings" for module in head):
        raise UnsupportedEncoderError("the model changes token vectors between its transformer and its pooling")
    return transformer, tuple(head)
