"""SMAE as one would first write it: logits at every place, for one cup after the other, by transformers' own forwards.

What `nestling.embed.pretraining.autoencoder` is measured against, by tests in numbers and by `smae_speed.py` in time
and memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from nestling.embed.model.parts import Encoder
from nestling.embed.pretraining.autoencoder import MaskedAutoencoder

IGNORED = -100


def naive(smae: MaskedAutoencoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and its parts, of the same weights and with the same meaning as ``smae(batch)``; plain decoder."""
    encoder = Encoder.of(smae.encoder)
    backbone = encoder.backbone
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = backbone(**given, output_hidden_states=True)
    parts, total = {}, 0.0
    for cup in smae.sizes:
        state = output.hidden_states[cup.layers]
        if cup.layers == encoder.depth:
            state = output.last_hidden_state
        elif encoder.final_norm is not None:
            state = encoder.final_norm(state)
        cut = state[..., : cup.dims]
        mlm = _entropy(smae, _transform(smae, cut), batch["labels"], batch["masked"]) * batch["share"]
        parts[f"mlm_{cup}"], loss = mlm, mlm
        if smae.decoder is not None:
            vector = _transform(smae, encoder.pool(given, state)[:, : cup.dims])
            with _decoding(encoder, smae.decoder.layer, vector):
                made = backbone(input_ids=batch["decoder_ids"], attention_mask=batch["attention_mask"])
            made = _transform(smae, made.last_hidden_state)
            dec = _entropy(smae, made, batch["labels"], batch["rebuilt"]) * batch["decoder_share"]
            parts[f"dec_{cup}"], loss = dec, (mlm + dec) / 2
        total = total + loss / len(smae.sizes)
    return {"loss": total, **parts}


def _transform(smae: MaskedAutoencoder, states: Tensor) -> Tensor:
    """The head up to its output matrix; coordinates that a cup lacks are zero, which is its dense layer cut."""
    head, lacking = smae.head, smae.head.dense.in_features - states.shape[-1]
    padded = torch.cat((states, states.new_zeros(*states.shape[:-1], lacking)), -1)
    return head.norm(head.activation(head.dense(padded)))


def _entropy(smae: MaskedAutoencoder, states: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """The sum over the wanted places, from the logits of all."""
    matrix = Encoder.of(smae.encoder).backbone.get_input_embeddings().weight
    logits = linear(states, matrix if smae.head.own is None else smae.head.own, smae.head.bias)
    targets = labels.masked_fill(~wanted, IGNORED)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@contextmanager
def _decoding(encoder: Encoder, layer: nn.Module, vector: Tensor) -> Iterator[None]:
    """The encoder with one other layer, and with a vector in place 0 of what its embeddings make."""

    def put(module, args, output):
        return torch.cat((vector[:, None], output[:, 1:]), 1)

    path, _, name = encoder.anatomy.layers.rpartition(".")
    owner, layers = encoder.backbone.get_submodule(path), encoder.layers
    handle = encoder.backbone.embeddings.register_forward_hook(put)
    setattr(owner, name, nn.ModuleList([layer]))
    try:
        yield
    finally:
        setattr(owner, name, layers)
        handle.remove()
