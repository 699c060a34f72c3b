"""The first layers as a model that shares its weights: the vectors of those depths, and changes that are its own."""

import pytest
import torch

from nestling.embed.model.body import add_low_rank, body_of, linear_layers, merge_low_rank
from nestling.embed.model.encode import encode
from nestling.embed.model.fingerprint import fingerprint
from nestling.embed.model.parts import Encoder

from ..families import FAMILIES, some_texts

TEXTS = some_texts(12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_is_the_first_layers(family, encoder):
    model = encoder(family)
    before = encode(model, TEXTS, {1: 32, 2: 32, 4: 32})
    body = body_of(Encoder.of(model), 2)
    found = encode(body, TEXTS, {1: 32, 2: 32})
    assert torch.equal(found[1], before[1]) and torch.equal(found[2], before[2])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in body.parameters())
    added = add_low_rank(body, 3, seed=0)
    torch.testing.assert_close(encode(body, TEXTS, {2: 32})[2], before[2], rtol=0, atol=1e-5)  # zero at first
    for change in added.values():
        torch.nn.init.normal_(change.up, std=0.1)
    changed = encode(body, TEXTS, {1: 32, 2: 32})
    merged = body_of(Encoder.of(model), 2)
    merge_low_rank(merged, {name: (change.down.detach(), change.up.detach()) for name, change in added.items()})
    for depth, vectors in encode(merged, TEXTS, {1: 32, 2: 32}).items():
        assert (vectors - before[depth]).abs().max() > 0.01
        torch.testing.assert_close(vectors, changed[depth], rtol=1e-4, atol=1e-5)
    for depth, vectors in encode(model, TEXTS, {1: 32, 2: 32, 4: 32}).items():
        assert torch.equal(vectors, before[depth])  # the model itself is as it was


def test_what_is_not_changed_is_shared(encoder):
    model = encoder()
    body = body_of(Encoder.of(model), 2)
    merge_low_rank(body, {name: (torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1))
                          for name, layer in linear_layers(body).items()})  # fmt: skip
    own = {tensor.data_ptr() for tensor in model.parameters()}
    words = body[0].model.get_input_embeddings().weight
    assert words.data_ptr() in own
    assert not {layer.weight.data_ptr() for layer in linear_layers(body).values()} & own


def test_a_fingerprint_is_of_what_vectors_depend_on(encoder):
    model, same, other = encoder(), encoder(), encoder()
    other[0].model.encoder.layer[3].output.dense.bias.data += 1
    assert fingerprint(model) == fingerprint(same) != fingerprint(other)
    same[0].model.pooler = None
    assert fingerprint(model) == fingerprint(same)
