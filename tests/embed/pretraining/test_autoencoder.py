"""SMAE's losses and gradients against a naive reference by transformers' own forwards, for every family."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForMaskedLM

from nestling.embed.ladder import Ladder
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.parts import Encoder
from nestling.embed.pretraining.autoencoder import MaskedAutoencoder
from nestling.embed.pretraining.collate import Collator
from nestling.embed.pretraining.corpus import Corpus
from nestling.embed.pretraining.masking import Masking
from nestling.errors import LadderError, UnsupportedEncoderError

from ..families import FAMILIES, VOCAB, WORDS, sentence_model, some_texts, tokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
naive = importlib.import_module("smae_naive").naive
sys.path.pop(0)

CUPS = Ladder.parse("1x8,2x16,3x16,4x32")
KNOWN = ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert"]


def batch(parts: int = 1, sampled: int | None = None, count: int = 8) -> list[dict]:
    """Texts of 2 to 12 words under both masks."""
    texts = [text for text in some_texts(12, seed=3) if " " in text][:count]
    found = next(Corpus(texts, tokenizer(), 16, len(texts)).batches())
    return Collator(Masking(4, np.arange(5, VOCAB)), 0, len(CUPS), sampled)(found, parts)


def autoencoder(model, cups=CUPS) -> MaskedAutoencoder:
    """With biases that are not zero, so that none can be left out."""
    smae = MaskedAutoencoder(model, cups)
    with torch.no_grad():
        for parameter in smae.head.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return smae.eval()


def gradients(smae, parts) -> dict[str, torch.Tensor]:
    smae.zero_grad()
    parts["loss"].backward()
    return {name: p.grad.clone() for name, p in smae.named_parameters() if p.grad is not None}


def close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", KNOWN)
def test_parts_and_gradients_are_those_of_the_naive_reference(family, pooling, encoder):
    smae, (given,) = autoencoder(encoder(family, pooling)), batch()
    found, expected = smae(given), naive(smae, given)
    close(found, expected)
    assert len({f"{value:.4f}" for value in found.values()}) == len(found)  # every part is another number
    close(gradients(smae, found), gradients(smae, expected))


@pytest.mark.parametrize("family", KNOWN)
def test_without_decoder_and_small_cups_it_is_plain_masked_language_modelling(family, encoder, tmp_path):
    """The loss that transformers' own masked-language model computes, with the head that its folder has."""
    model = encoder(family)
    whole = AutoModelForMaskedLM.from_config(Encoder.of(model).backbone.config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    own = sentence_model(tmp_path)
    smae = MaskedAutoencoder(own, Ladder.parse("4x32"), decoder=False).eval()
    assert not smae.head.new
    (given,) = batch()
    wanted = given["labels"].masked_fill(~given["masked"], -100)
    expected = whole(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=wanted).loss
    found = smae(given)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-6)
    assert set(found) == {"loss", "mlm_4x32"} and smae.decoder is None


def test_a_head_of_its_own_matrix_is_kept(encoder, tmp_path):
    config = Encoder.of(encoder()).backbone.config
    config.tie_word_embeddings = False
    whole = AutoModelForMaskedLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    smae = MaskedAutoencoder(sentence_model(tmp_path), CUPS)
    torch.testing.assert_close(smae.head.own, whole.get_output_embeddings().weight)
    (given,) = batch()
    close(smae.eval()(given), naive(smae, given))


def test_a_new_head_is_drawn_by_the_seed_and_leaves_the_callers_random_numbers_alone(encoder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    heads = [MaskedAutoencoder(encoder(), CUPS, seed=seed).head for seed in (1, 1, 2)]
    assert all(head.new and head.own is None for head in heads)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.equal(heads[0].dense.weight, heads[1].dense.weight)
    assert not torch.equal(heads[0].dense.weight, heads[2].dense.weight)


def test_parts_of_a_batch_add_up(encoder):
    """What processes and steps of accumulation compute, averaged, is the loss of the global batch."""
    smae = autoencoder(encoder())
    (whole,), cut = batch(1), batch(4)
    found = [smae(part) for part in cut]
    means = {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}
    close(means, smae(whole))


def test_some_cups_of_a_step(encoder):
    smae, (given,) = autoencoder(encoder()), batch(sampled=2)
    assert given["sizes"].tolist()[-1] == 3 and len(given["sizes"]) == 2
    chosen = [CUPS.sizes[i] for i in given["sizes"].tolist()]
    found, every = smae(given), smae({k: v for k, v in given.items() if k != "sizes"})
    assert set(found) == {"loss", *(f"{kind}_{cup}" for kind in ("mlm", "dec") for cup in chosen)}
    close({k: v for k, v in found.items() if k != "loss"}, {k: every[k] for k in found if k != "loss"})
    mean = sum(found[f"{kind}_{cup}"].item() for kind in ("mlm", "dec") for cup in chosen) / 4
    assert found["loss"].item() == pytest.approx(mean, rel=1e-5)


def test_dropout_is_on_in_training_everywhere(encoder):
    """Two forwards differ, in both kinds of part; attention's own dropout too."""
    smae, (given,) = autoencoder(encoder()), batch()
    smae.train()
    first, second = smae(given), smae(given)
    assert all(first[name] != second[name] for name in first)
    for module in smae.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert smae(given)["loss"] == smae(given)["loss"]
    smae.decoder.layer.attention.self.dropout.p = 0.5
    first, second = smae(given), smae(given)
    assert first["mlm_1x8"] == second["mlm_1x8"] and first["dec_1x8"] != second["dec_1x8"]


def test_bf16_is_near(encoder):
    smae, (given,) = autoencoder(encoder()), batch()
    expected = smae(given)
    full = gradients(smae, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = smae(given)
    half = gradients(smae, found)
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.03), name
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    one, other = (torch.cat([g[name].flatten() for name in full]) for g in (full, half))
    assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.99


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(KNOWN)))
def test_other_families_are_refused(family, encoder):
    with pytest.raises(UnsupportedEncoderError, match="where their head is is only known for bert, roberta"):
        MaskedAutoencoder(encoder(family), CUPS)


def test_what_pre_training_does_not_fit_is_refused(backbones):
    transformer = Transformer(str(backbones("bert")))
    modules = [transformer, Pooling(32, "mean"), Dense(32, 16)]
    with pytest.raises(UnsupportedEncoderError, match="ends in Pooling, Dense: .* expected a Pooling alone"):
        MaskedAutoencoder(SentenceTransformer(modules=modules, device="cpu"), Ladder.parse("4x16"))
    modules = [transformer, Pooling(32, ("mean", "cls"))]
    with pytest.raises(UnsupportedEncoderError, match="vectors of 64 of token vectors of 32: expected one mode"):
        MaskedAutoencoder(SentenceTransformer(modules=modules, device="cpu"), Ladder.parse("4x64"))
    with pytest.raises(LadderError, match="the full size 4x32 is missing"):
        MaskedAutoencoder(sentence_model(backbones("bert")), Ladder.parse("2x16"))


def test_a_plain_folder_is_loaded_with_a_pooling(backbones):
    model = load_encoder(backbones("bert"), pooling="cls")
    torch.testing.assert_close(model.encode(WORDS[:3]), sentence_model(backbones("bert"), "cls").encode(WORDS[:3]))
