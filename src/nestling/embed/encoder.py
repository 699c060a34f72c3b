"""The version seam of the embedding wing: where a SentenceTransformer keeps its layers, and how it is made shallower.

Everything that depends on the insides of transformers and sentence-transformers is here. What is found is not taken on
trust: a probe of a few tokens checks that the layers follow one another with nothing between them, and that what
follows the last one is a norm that can be applied to the others, which is what a k-layer model does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, WeightedLayerPooling
from torch import Tensor, nn
from transformers import PreTrainedConfig

Features = dict[str, Any]
PROBE = 4  # tokens


class UnsupportedEncoderError(ValueError):
    """A model that cannot be cut into cups. The message names it and the reason."""


@dataclass(frozen=True)
class _Anatomy:
    """Names within the backbone: of the list of layers, and of the norm behind the last one (pre-norm models)."""

    layers: str
    norm: str | None


_ANATOMIES: WeakKeyDictionary[nn.Module, _Anatomy] = WeakKeyDictionary()


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
    anatomy: _Anatomy

    @classmethod
    def of(cls, model: nn.Module) -> Encoder:
        """The parts of a model, which may be wrapped by DistributedDataParallel or torch.compile.

        Raises:
            UnsupportedEncoderError: it is no sentence encoder, or it has no layers to cut.
        """
        inner = unwrapped(model)
        transformer, head = _parts(inner)
        backbone: nn.Module = transformer.model
        anatomy = _ANATOMIES.get(backbone)
        if anatomy is None:
            anatomy = _ANATOMIES[backbone] = _dissected(transformer)
        return cls(inner, transformer, backbone, head, anatomy)

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
        made = {key: value for key, value in fresh(features).items() if key != "sentence_embedding"}
        made["token_embeddings"] = tokens
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
                states[number] = _state(output)

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


def eager(model: nn.Module):
    """A context in which compiled parts of the model run as they were written, if there are any.

    torch.compile does not notice hooks that come and go: compiled code would go on filling the variables of the hook
    that it was traced with.
    """
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def fresh(features: Mapping[str, Any]) -> Features:
    """A copy that modules may write to: they add keys, and a pooling without prompts may clear bits of the mask."""
    return {key: value.clone() if key == "attention_mask" else value for key, value in features.items()}


def depth_of(config: PreTrainedConfig) -> int:
    """Number of layers that a config asks for, whatever its family calls them (``n_layers``, ``num_layers``).

    Raises:
        UnsupportedEncoderError: it names no number of layers.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UnsupportedEncoderError(f"a {config.model_type} model has no number of layers in its config")
    return depth


def truncated_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """A copy of the config for the model of the first ``depth`` layers; lists with an entry per layer are cut too.

    Raises:
        UnsupportedEncoderError: it names no number of layers.
        ValueError: the model has fewer layers than that.
    """
    full = depth_of(config)
    if not 1 <= depth <= full:
        raise ValueError(f"cannot keep {depth} of {full} layers: expected 1 to {full}")
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


def _dissected(transformer: Transformer) -> _Anatomy:
    """Find the layers and the final norm, and check by a probe that they are all there is.

    Raises:
        UnsupportedEncoderError: layers are shared, there is no one list of them, or something else happens between or
            behind them.
    """
    backbone = transformer.model
    depth = depth_of(backbone.config)
    kind = f"{backbone.config.model_type} models cannot be cut"
    names = [n for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    names = [name for name in names if not any(part.isdigit() for part in name.split("."))]
    if len(names) != 1:
        raise UnsupportedEncoderError(f"{kind}: expected one list of {depth} layers, found {len(names)}")
    inputs, outputs, last = _probe(transformer, backbone.get_submodule(names[0]))
    for number, (after, before) in enumerate(zip(outputs, inputs[1:], strict=False), 1):
        if not _same(after, before):
            raise UnsupportedEncoderError(f"{kind}: something happens between layers {number} and {number + 1}")
    if _same(outputs[-1], last):
        return _Anatomy(names[0], None)
    with torch.no_grad():
        for name, module in _norms(backbone, names[0]):
            if _same(module(outputs[-1]), last):
                return _Anatomy(names[0], name)
    raise UnsupportedEncoderError(f"{kind}: what follows the last layer is not a norm")


def _norms(backbone: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """The norms beside the list of layers, and beside every module around it: the nearest first."""
    path = layers
    while path:
        path = path.rpartition(".")[0]
        for name, module in backbone.get_submodule(path).named_children():
            if type(module).__name__.lower().endswith("norm"):
                yield f"{path}.{name}".lstrip("."), module


@torch.no_grad()
def _probe(transformer: Transformer, layers: nn.Module) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs and outputs of every layer, and the token vectors of the whole transformer, for a short text."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def enter(module, args, kwargs):
        inputs.append(_state(args) if args else kwargs["hidden_states"])

    def leave(module, args, output):
        outputs.append(_state(output))

    backbone: Any = transformer.model
    training = {module: module.training for module in transformer.modules()}
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers.children()]
    handles += [layer.register_forward_hook(leave) for layer in layers.children()]
    ids = torch.arange(1, 1 + PROBE, device=backbone.device) % backbone.get_input_embeddings().num_embeddings
    try:
        with eager(transformer):
            last = transformer.eval()({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])})
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return inputs, outputs, last["token_embeddings"]


def _state(output: Any) -> Tensor:
    """The hidden states of a layer's arguments or result, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
