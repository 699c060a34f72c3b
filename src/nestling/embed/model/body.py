"""The first layers of an encoder as a model of its own that shares its weights, with low-rank changes of its layers.

The encoder itself is not touched: what is changed, or trained, is in modules of the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from nestling.embed.model.copies import copied_tree, descend
from nestling.embed.model.encode import served_prompts
from nestling.embed.model.layers import fit_length
from nestling.embed.model.parts import Encoder, truncated_config
from nestling.errors import UnsupportedEncoderError

SCALE = 2.0  # of the low-rank changes


class LowRank(nn.Linear):
    """A linear layer with a change of low rank: ``x W^T + b + SCALE x down^T up^T``.

    Args:
        inner: the layer, whose weights are shared.
        down: ``[rank, in]``.
        up: ``[out, rank]``.
    """

    def __init__(self, inner: nn.Linear, down: Tensor, up: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.weight, self.bias = inner.weight, inner.bias
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return super().forward(x) + linear(linear(x, self.down), self.up) * SCALE


def body_of(encoder: Encoder, depth: int) -> SentenceTransformer:
    """The first ``depth`` layers with the encoder's own head, in eval mode; tensors are shared, without gradients."""
    transformer: Any = copied_tree(encoder.shortened(depth))
    fit_length(transformer)
    backbone = transformer.model
    backbone.config = truncated_config(encoder.transformer.model.config, depth)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # BERT's, which no pooling of sentence-transformers reads
    body = SentenceTransformer(
        modules=[transformer, *(copied_tree(module) for module in encoder.head)],
        prompts=served_prompts(encoder.model),
        default_prompt_name=encoder.model.default_prompt_name,
        similarity_fn_name=encoder.model.similarity_fn_name,
        truncate_dim=encoder.model.truncate_dim,
        device=str(encoder.model.device),
    )
    for module in body.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    body.model_card_data.base_model = encoder.model.model_card_data.base_model
    return body.eval()


def linear_layers(body: SentenceTransformer) -> dict[str, nn.Linear]:
    """The linear layers within a body's layers, by their names there, such as ``0.attention.self.query``.

    Raises:
        UnsupportedEncoderError: there are none.
    """
    found = {name: module for name, module in _layers(body).named_modules() if type(module) is nn.Linear}
    if not found:
        raise UnsupportedEncoderError("the model's layers hold no linear layers, which low-rank changes are of")
    return found


def add_low_rank(body: SentenceTransformer, rank: int, seed: int) -> dict[str, LowRank]:
    """Give every linear layer of a body a low-rank change that is zero at first; by the layers' names."""
    generator = torch.Generator().manual_seed(seed)
    added = {}
    for name, inner in linear_layers(body).items():
        out, width = inner.weight.shape
        down = (torch.rand(rank, width, generator=generator) * 2 - 1) * width**-0.5
        added[name] = LowRank(inner, down.to(inner.weight), torch.zeros(out, rank).to(inner.weight))
        _put(body, name, added[name])
    return added


def merge_low_rank(body: SentenceTransformer, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put changes (``down``, ``up``) into the weights of a body, which then are its own."""
    for name, inner in linear_layers(body).items():
        down, up = (factor.to(inner.weight) for factor in changes[name])
        inner._parameters["weight"] = nn.Parameter(inner.weight + SCALE * (up @ down), requires_grad=False)


def _layers(body: SentenceTransformer) -> nn.Module:
    encoder = Encoder.of(body)
    return descend(encoder.backbone, encoder.anatomy.layers)


def _put(body: SentenceTransformer, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    _layers(body).get_submodule(path)._modules[last] = module
