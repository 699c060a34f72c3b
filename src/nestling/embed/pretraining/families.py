"""The seam of pre-training to transformers: where a family's masked-language model has its head.

Tests hold it to the models' own forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
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
    config: Any = encoder.backbone.config
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedEncoderError(
            f"{config.model_type} models cannot be pre-trained: where their head is is only known for {known}"
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


def masked_head(model: SentenceTransformer, seed: int) -> MaskedHead:
    """The masked-language head of the checkpoint that the encoder came from, else a new one.

    A head is taken if its weights are beside those of the encoder, under the name that the model carries, and fit its
    vocabulary. A new one has the family's form, weights drawn by ``seed``, and the word embeddings as its output.
    """
    encoder = Encoder.of(model)
    config: Any = encoder.backbone.config
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


_ROBERTA = Family("lm_head.dense", None, "lm_head.layer_norm", "lm_head.decoder")
_TRANSFORM = "cls.predictions.transform"
FAMILIES = {
    "bert": Family(
        f"{_TRANSFORM}.dense", f"{_TRANSFORM}.transform_act_fn", f"{_TRANSFORM}.LayerNorm", "cls.predictions.decoder"
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": _ROBERTA,
    "distilbert": Family("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    "modernbert": Family("head.dense", "head.act", "head.norm", "decoder"),
}
