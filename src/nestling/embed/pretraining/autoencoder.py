"""SMAE's losses (arXiv 2410.13230): every size predicts masked words, and rebuilds the text from its sentence vector.

One encoder forward for all sizes, one decoder layer for all of them, states at masked places only, and one pass over
the vocabulary in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from nestling.embed.ladder import Ladder
from nestling.embed.model.copies import copied, descend
from nestling.embed.model.parts import Encoder
from nestling.embed.model.taps import token_taps
from nestling.embed.pretraining.families import check, masked_head
from nestling.losses import cross_entropies


class MaskedAutoencoder(nn.Module):
    """What is trained: the encoder, its masked-language head, and the decoder that is thrown away afterwards.

    For a size (n, d), with h_n the token vectors of the n-layer model (`nestling.embed.model.taps`) and f the head's
    transform, whose dense layer is applied with its first d input columns:

        mlm = CE of the encoder's masked tokens, from f(h_n[:d])
        dec = CE of the decoder's masked tokens, from f(decoder(f(pooled h_n [:d]), the text under the decoder's mask))

    The loss is the mean over sizes of (mlm + dec) / 2, and of mlm alone without a decoder: with the full size only
    that is plain masked-language modelling.

    Args:
        model: a sentence encoder of a family of `nestling.embed.pretraining.families`, whose pooling makes the
            sentence vector.
        sizes: all of them; a batch may ask for some.
        decoder: whether there is one.
        seed: of a head's weights, where the checkpoint has none.

    Raises:
        UnsupportedEncoderError: see `nestling.embed.pretraining.families.check`.
        LadderError: the sizes do not fit the model.
    """

    accepts_loss_kwargs = False  # the Trainer divides by the steps of accumulation

    def __init__(self, model: SentenceTransformer, sizes: Ladder, decoder: bool = True, seed: int = 0):
        super().__init__()
        check(model)
        parts = Encoder.of(model)
        self.sizes = sizes.check(parts.depth, parts.dims)
        self.encoder = model
        self.head = masked_head(model, seed)
        self.decoder = Decoder(parts) if decoder else None

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts. All but ``loss`` are detached.

        Args:
            batch: as `nestling.embed.pretraining.collate.Collator` makes it:

                * ``input_ids, decoder_ids``: tokens as encoder and decoder see them ``[B, T]``, padded on the right.
                * ``attention_mask``: ``[B, T]``, 1 for tokens.
                * ``labels``: the tokens themselves ``[B, T]``.
                * ``masked, rebuilt``: ``[B, T]`` bool, what is predicted by the encoder and by the decoder.
                * ``share, decoder_share``: weight of one such token: 1 / (their number in the global batch), times the
                  number of parts that the global batch is cut into.
                * ``sizes``, if it is there: numbers of the ladder's sizes that are trained in this step; else all are.

        Returns:
            ``{"loss", "mlm_2x32", ..., "dec_2x32", ...}``, means over the masked tokens in nats.
        """
        sizes = batch["sizes"].tolist() if "sizes" in batch else range(len(self.sizes))
        chosen = [self.sizes.sizes[i] for i in sizes]
        features = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels, masked, rebuilt = (batch[name] for name in ("labels", "masked", "rebuilt"))
        share, decoder_share = batch["share"], batch["decoder_share"]
        tokens = token_taps(self.encoder, features, {size.layers for size in chosen})
        seen = {layer: states[masked] for layer, states in tokens.items()}
        states = [torch.cat([self.head.transform(seen[size.layers][:, : size.dims]) for size in chosen])]
        targets, weights = [labels[masked].repeat(len(chosen))], [share.expand(len(states[0]))]
        if self.decoder is not None:
            encoder = Encoder.of(self.encoder)
            pooled = {layer: encoder.pool(features, states) for layer, states in tokens.items()}
            vectors = torch.stack([self.head.transform(pooled[size.layers][:, : size.dims]) for size in chosen])
            states.append(self.head.transform(self.decoder(encoder, batch, vectors)))
            targets.append(labels[rebuilt].repeat(len(chosen)))
            weights.append(decoder_share.expand(len(states[1])))
        found = cross_entropies(
            torch.cat(states), self._matrix, self.head.bias, torch.cat(targets),
            torch.cat(weights) / (len(chosen) * len(states)),
        )  # fmt: skip
        parts = found.each.split([len(part) for part in states])
        shares = (("mlm", share), ("dec", decoder_share))
        return {"loss": found.loss} | {
            f"{name}_{size}": each.sum() * weight
            for (name, weight), part in zip(shares, parts, strict=False)
            for size, each in zip(chosen, part.chunk(len(chosen)), strict=True)
        }

    @property
    def _matrix(self) -> Tensor:
        own = self.head.own
        return Encoder.of(self.encoder).backbone.get_input_embeddings().weight if own is None else own  # type: ignore


class Decoder(nn.Module):
    """One layer, a copy of the encoder's first, that rebuilds texts from sentence vectors and some of their tokens.

    It takes the place of all layers of the encoder, whose embeddings, masks and final norm are used as they are.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.layer = copy.deepcopy(encoder.layers[0])

    def forward(self, encoder: Encoder, batch: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
        """States to predict tokens from, ``[C * N, H]``, those of a size in the order of the places that are rebuilt.

        Args:
            batch: as of `MaskedAutoencoder.forward`.
            vectors: of the sizes, ``[C, B, H]``; each stands in the place of its text's first token.
        """
        count, backbone = len(vectors), encoder.shortened(1).model
        layer: Any = copied(self.layer)
        run = layer.forward

        def with_vectors(states: Tensor, *args: Any, **more: Any) -> Any:
            return run(torch.cat((vectors.flatten(0, 1).to(states.dtype)[:, None], states[:, 1:]), 1), *args, **more)

        layer.forward = with_vectors
        descend(backbone, encoder.anatomy.layers)._modules["0"] = layer
        ids, mask, wanted = (batch[name].repeat(count, 1) for name in ("decoder_ids", "attention_mask", "rebuilt"))
        return backbone(input_ids=ids, attention_mask=mask).last_hidden_state[wanted]
