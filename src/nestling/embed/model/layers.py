"""Where a backbone keeps its layers, and what it does behind the last one: looked up, and checked by a probe.

What the names of a model suggest is not taken on trust. A short text is sent through it to see that its layers follow
one another with nothing between them, and that what follows the last one is a norm that can be applied to the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nestling.embed.model.copies import copied_tree, plain
from nestling.errors import UnsupportedEncoderError

PROBE = 4  # tokens


@dataclass(frozen=True)
class Anatomy:
    """What is where in a backbone.

    Attributes:
        layers: name of the list of layers.
        norm: name of the norm behind the last one (pre-norm models), or None.
        positions: as `positions_of`.
    """

    layers: str
    norm: str | None
    positions: int | None


_FOUND: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy_of(transformer: Transformer) -> Anatomy:
    """The names within the backbone of a sentence-transformers module; found once for each backbone.

    Raises:
        UnsupportedEncoderError: layers are shared, there is no one list of them, or something else happens between or
            behind them.
    """
    backbone: nn.Module = plain(transformer.model)
    if backbone not in _FOUND:
        _FOUND[backbone] = _dissected(transformer)
    return _FOUND[backbone]


def depth_of(config: PreTrainedConfig) -> int:
    """Number of layers that a config asks for, whatever its family calls them (``n_layers``, ``num_layers``).

    Raises:
        UnsupportedEncoderError: it names no number of layers.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UnsupportedEncoderError(f"a {config.model_type} model has no number of layers in its config")
    return depth


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a text that a model has learned positions for; None if it learns none.

    RoBERTa's and its relatives' start behind the padding token's number, OPT's at an offset of the table's own.
    """
    for module in model.modules():
        for name in ("position_embeddings", "embed_positions", "wpe"):
            if isinstance(table := getattr(module, name, None), nn.Embedding):
                padding = getattr(module, "padding_idx", None)
                behind = padding + 1 if isinstance(padding, int) else 0
                return table.num_embeddings - getattr(table, "offset", behind)
    return None


def fit_length(transformer: Transformer) -> None:
    """Let a transformer cut texts to the positions that it has, if it would let longer ones through."""
    limit, reads = positions_of(transformer), transformer.max_seq_length
    if limit is not None and (reads is None or reads > limit):
        transformer.max_seq_length = limit


def _dissected(transformer: Transformer) -> Anatomy:
    """The layers and the final norm, if a probe of a copy shows that they are all there is."""
    transformer = copied_tree(transformer).eval()
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
        return Anatomy(names[0], None, positions_of(backbone))
    with torch.no_grad():
        for name, module in _norms(backbone, names[0]):
            if _same(module(outputs[-1]), last):
                return Anatomy(names[0], name, positions_of(backbone))
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
        inputs.append(state_of(args) if args else kwargs["hidden_states"])

    def leave(module, args, output):
        outputs.append(state_of(output).clone())  # a next layer that writes into it is found out

    backbone: Any = transformer.model
    for layer in layers.children():
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave)
    ids = torch.arange(1, 1 + PROBE, device=backbone.device) % backbone.get_input_embeddings().num_embeddings
    last = transformer({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])})
    return inputs, outputs, last["token_embeddings"]


def state_of(output: Any) -> Tensor:
    """The hidden states of a layer's arguments or result, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
