"""The seam of pre-training to transformers: masked-language heads, embeddings, and the inside of a family's layer.

What depends on how transformers names and orders the parts of BERT, RoBERTa, XLM-R, MPNet, DistilBERT and ModernBERT
is here. Tests hold it to the models' own forwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear
from transformers import AutoModelForMaskedLM

from nestling.embed.model.parts import Encoder, truncated_config
from nestling.errors import UnsupportedEncoderError
from nestling.models import locate, quiet

MASKS = ("<mask>", "[MASK]")


def declare_mask(tokenizer: Any) -> None:
    """Say which token is the mask, if the vocabulary has one and nobody says so.

    Some conversions of XLM-R's tokenizer leave it there and do not list it.
    """
    if tokenizer.mask_token_id is None:
        for token in MASKS:
            if token in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"mask_token": token})
                return


@dataclass(frozen=True)
class Family:
    """Where a family's masked-language model has its head: dense layer, activation (None is GELU), norm, output."""

    dense: str
    activation: str | None
    norm: str
    output: str
    layer: Callable[[Any], Parts]


@dataclass(frozen=True)
class Parts:
    """A layer as functions.

    Attributes:
        heads: number of attention heads.
        queries, keys, values: of vectors ``[..., H]``, ``[..., H]`` each, before rotary positions.
        dropout: of attention weights, a share.
        end: attention's result and the layer's input, both ``[..., H]``, to the layer's output.
    """

    heads: int
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    dropout: float
    end: Callable[[Tensor, Tensor], Tensor]


class MaskedHead(nn.Module):
    """Dense, activation, norm, then an output matrix that is the word embeddings, unless the checkpoint has its own.

    Attributes:
        own: that matrix ``[V, H]``, or None.
        bias: of the output ``[V]``, or None.
        new: whether its weights are random, since the checkpoint has none.
    """

    def __init__(self, model: nn.Module, family: Family, new: bool):
        super().__init__()
        output: Any = model.get_submodule(family.output)
        self.dense: Any = model.get_submodule(family.dense)
        self.activation = gelu if family.activation is None else model.get_submodule(family.activation)
        self.norm = model.get_submodule(family.norm)
        tied = new or model.config.tie_word_embeddings  # type: ignore[union-attr]
        self.own = None if tied else nn.Parameter(output.weight.detach().clone())
        self.bias = None if output.bias is None else nn.Parameter(output.bias.detach().clone())
        self.new = new

    def transform(self, states: Tensor) -> Tensor:
        """What the output matrix is applied to, ``[..., H]``, of the first d coordinates ``[..., d]`` alone: the dense
        layer's first d input columns, with its whole bias.
        """
        dense = self.dense
        return self.norm(self.activation(linear(states, dense.weight[:, : states.shape[-1]], dense.bias)))


def check(model: nn.Module) -> None:
    """Whether a sentence encoder can be pre-trained.

    Raises:
        UnsupportedEncoderError: it is of another family, its pooling changes the width of vectors or has something
            behind it, or its word embeddings have another width than its layers.
    """
    encoder = Encoder.of(model)
    config = _config(encoder)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedEncoderError(
            f"{config.model_type} models cannot be pre-trained: where their head and the parts of their layers are is "
            f"only known for {known}"
        )
    pooling = encoder.head[0]
    if len(encoder.head) > 1 or not isinstance(pooling, Pooling):
        kinds = ", ".join(type(module).__name__ for module in encoder.head)
        raise UnsupportedEncoderError(
            f"the model ends in {kinds}: pre-training shapes token vectors and their pooling, expected a Pooling alone"
        )
    if encoder.dims != encoder.width:
        raise UnsupportedEncoderError(
            f"the model has truncate_dim={encoder.model.truncate_dim}: pre-training shapes whole vectors, leave it out"
        )
    if encoder.dims != config.hidden_size:
        raise UnsupportedEncoderError(
            f"the pooling makes vectors of {encoder.dims} of token vectors of {config.hidden_size}: expected one mode"
        )


def positions_of(encoder: Encoder) -> int | None:
    """Tokens that the model has positions for; None if it has no such limit. RoBERTa's start behind the padding's."""
    table = getattr(encoder.backbone.embeddings, "position_embeddings", None)
    if table is None:
        return _config(encoder).max_position_embeddings
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def vocabulary_of(encoder: Encoder) -> int:
    """Tokens that the model has word embeddings for."""
    return _config(encoder).vocab_size


def _config(encoder: Encoder) -> Any:
    return encoder.backbone.config


def masked_head(model: SentenceTransformer, seed: int) -> MaskedHead:
    """The masked-language head of the checkpoint that the encoder came from, else a new one.

    A head is taken if its weights are beside those of the encoder, under the name that the model carries, and fit its
    vocabulary. A new one has the family's form, weights drawn by ``seed``, and the word embeddings as its output.
    """
    encoder = Encoder.of(model)
    config = _config(encoder)
    family, short = FAMILIES[config.model_type], truncated_config(config, 1)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = _checkpoint(str(getattr(encoder.backbone, "name_or_path", "") or ""), short, family)
        new = found is None or found.config.vocab_size != config.vocab_size
        if found is None or new:
            found = AutoModelForMaskedLM.from_config(short)
    return MaskedHead(found, family, new).to(model.device, torch.float32)


def _checkpoint(name: str, config: Any, family: Family) -> Any:
    """The masked-language model of that name, as far as its first layer; None if there is none with a head."""
    try:
        source = locate(name)
        local = source != name
        found, report = AutoModelForMaskedLM.from_pretrained(
            source, config=config, output_loading_info=True, local_files_only=local, use_safetensors=True
        )
    except Exception:  # not there, of other shapes, or damaged since: there is no head to take
        return None
    return None if f"{family.dense}.weight" in report["missing_keys"] else found


class Decoder(nn.Module):
    """One layer, a copy of the encoder's first, that rebuilds a text from a sentence vector and some of its tokens.

    In each text's place 0 is its sentence vector. Since a softmax over all places is the one over the others and the
    one place, mixed by their total weights, what the others give is computed once for all cups, and only where
    something is rebuilt.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.layer = copy.deepcopy(encoder.layers[0])
        self.family = FAMILIES[_config(encoder).model_type]

    def forward(self, encoder: Encoder, ids: Tensor, vectors: Tensor, visible: Tensor, wanted: Tensor,
                enhanced: bool) -> Tensor:  # fmt: skip
        """States to predict tokens from, ``[C, N, H]``, in the order of ``wanted``'s places.

        Args:
            ids: what is seen of the texts, ``[B, T]``, padded on the right.
            vectors: of the cups, ``[C, B, H]``.
            visible: ``[B, 1 or T, T]`` bool, which places each place reads; place 0 is always read.
            wanted: ``[B, T]`` bool, places that are rebuilt.
            enhanced: queries are sentence vectors and positions (RetroMAE, equation 4), not tokens.
        """
        parts = self.family.layer(self.layer)
        tokens = embedded(encoder, ids)
        places, kept = _gathered(wanted)  # [B, M]
        at = places[..., None].expand(-1, -1, tokens.shape[-1])
        inputs = tokens.gather(1, at)[None]  # [1, B, M, H]
        if enhanced:
            where = positions(encoder, ids)
            inputs = vectors[:, :, None].expand(-1, -1, places.shape[1], -1)
            inputs = inputs if where is None else inputs + where.gather(1, at)
        read = visible.expand(-1, ids.shape[1], -1).gather(1, places[..., None].expand(-1, -1, ids.shape[1])).clone()
        read[:, :, 0] = False
        given = _attention(encoder, parts, self.training, inputs, places, tokens, read, vectors)
        states = parts.end(given[:, kept], inputs.expand_as(given)[:, kept])
        return states if encoder.final_norm is None else encoder.final_norm(states)


def _attention(encoder, parts: Parts, training: bool, inputs, places, tokens, read, vectors) -> Tensor:
    """What each wanted place reads, ``[C, B, M, H]``."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (parts.heads, -1)).transpose(-2, -3)  # [..., heads, T, H / heads]

    drop = partial(dropout, p=parts.dropout, training=training)
    first = torch.zeros_like(places[:, :1])
    every = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    turn = turns(encoder, tokens)
    queries = turn(split(parts.queries(inputs)), places)  # [1 or C, B, heads, M, D]
    keys, values = turn(split(parts.keys(tokens)), every), split(parts.values(tokens))  # [B, heads, T, D]
    key, value = (split(f(vectors[:, :, None])) for f in (parts.keys, parts.values))  # [C, B, heads, 1, D]
    scale = keys.shape[-1] ** -0.5
    bias = relative_bias(encoder, places, every)  # [B, heads, M, T]
    scores = (queries @ keys.mT).float() * scale + bias
    scores = scores.masked_fill(~read[:, None], -1e9)
    score = (queries @ turn(key, first).mT).float() * scale + bias[..., :1]  # [C, B, heads, M, 1]
    share = torch.sigmoid(score - scores.logsumexp(-1, keepdim=True)).to(values.dtype)
    others = drop(scores.softmax(-1).to(values.dtype)) @ values
    mixed = (1 - share) * others + drop(share) * value
    return mixed.transpose(-2, -3).flatten(-2)


def _gathered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The wanted places of each text, ``[B, M]`` filled up with others, and which of them are meant, ``[B, M]``."""
    most = int(wanted.sum(1).max())
    places = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return places, wanted.gather(1, places)


def embedded(encoder: Encoder, ids: Tensor) -> Tensor:
    """What the first layer gets, ``[B, T, H]``: words, positions, norm and dropout."""
    return encoder.backbone.embeddings(input_ids=ids)  # type: ignore[operator]


def positions(encoder: Encoder, ids: Tensor) -> Tensor | None:
    """The embeddings of the places of texts ``[B, T]``, ``[B, T, H]``, without their words; None for rotary ones."""
    table: Any = getattr(encoder.backbone.embeddings, "position_embeddings", None)
    if table is None:
        return None
    if table.padding_idx is None:
        return table(torch.arange(ids.shape[1], device=ids.device)).expand(len(ids), -1, -1)
    tokens = (ids != table.padding_idx).long()  # RoBERTa and MPNet count them from behind the padding's place
    return table(tokens.cumsum(1) * tokens + table.padding_idx)


def turns(encoder: Encoder, tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that turns queries or keys ``[..., B, heads, M, D]`` by their places ``[B, M]``: rotary positions."""
    rotary: Any = getattr(encoder.backbone, "rotary_emb", None)
    if rotary is None:
        return lambda x, places: x

    def turned(x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (part[:, None] for part in rotary(tokens, places, _config(encoder).layer_types[0]))
        half = x.shape[-1] // 2
        other = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x.float() * cos + other.float() * sin).to(x.dtype)

    return turned


def relative_bias(encoder: Encoder, places: Tensor, every: Tensor) -> Tensor:
    """What MPNet adds to attention scores by distance, ``[B, heads, M, T]``; zero elsewhere."""
    inner: Any = getattr(encoder.backbone, "encoder", None)
    if not hasattr(inner, "relative_attention_bias"):
        return torch.zeros((1, 1, 1, 1), device=places.device)
    buckets = inner.relative_position_bucket(every[:, None] - places[..., None])
    return inner.relative_attention_bias(buckets).permute(0, 3, 1, 2)


def _bert(layer: Any) -> Parts:
    inner, output = layer.attention.self, layer.attention.output

    def end(given: Tensor, states: Tensor) -> Tensor:
        return layer.feed_forward_chunk(output(given, states))

    return Parts(inner.num_attention_heads, inner.query, inner.key, inner.value, inner.dropout.p, end)


def _mpnet(layer: Any) -> Parts:
    outer, inner = layer.attention, layer.attention.attn

    def end(given: Tensor, states: Tensor) -> Tensor:
        states = outer.LayerNorm(outer.dropout(inner.o(given)) + states)
        return layer.output(layer.intermediate(states), states)

    return Parts(inner.num_attention_heads, inner.q, inner.k, inner.v, inner.dropout.p, end)


def _distilbert(layer: Any) -> Parts:
    inner = layer.attention

    def end(given: Tensor, states: Tensor) -> Tensor:
        states = layer.sa_layer_norm(inner.out_lin(given) + states)
        return layer.output_layer_norm(layer.ffn(states) + states)

    return Parts(inner.n_heads, inner.q_lin, inner.k_lin, inner.v_lin, inner.dropout.p, end)


def _modernbert(layer: Any) -> Parts:
    inner = layer.attn

    def part(number: int) -> Callable[[Tensor], Tensor]:
        def apply(states: Tensor) -> Tensor:
            weight = inner.Wqkv.weight.chunk(3)[number]
            bias = None if inner.Wqkv.bias is None else inner.Wqkv.bias.chunk(3)[number]
            return linear(layer.attn_norm(states), weight, bias)

        return apply

    def end(given: Tensor, states: Tensor) -> Tensor:
        states = states + inner.out_drop(inner.Wo(given))
        return states + layer.mlp(layer.mlp_norm(states))

    return Parts(inner.config.num_attention_heads, part(0), part(1), part(2), inner.attention_dropout, end)


_ROBERTA = Family("lm_head.dense", None, "lm_head.layer_norm", "lm_head.decoder", _bert)
_TRANSFORM = "cls.predictions.transform"
FAMILIES = {
    "bert": Family(
        f"{_TRANSFORM}.dense", f"{_TRANSFORM}.transform_act_fn", f"{_TRANSFORM}.LayerNorm",
        "cls.predictions.decoder", _bert,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": replace(_ROBERTA, layer=_mpnet),
    "distilbert": Family("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector", _distilbert),
    "modernbert": Family("head.dense", "head.act", "head.norm", "decoder", _modernbert),
}  # fmt: skip
