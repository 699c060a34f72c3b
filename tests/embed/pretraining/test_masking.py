"""Masking: ratios, replacement, whole words, the encoder's words among the decoder's; whatever the text."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestling.embed.pretraining.masking import Masking, Window, chosen
from nestling.errors import MaskingError

MASK, ORDINARY = 4, np.arange(5, 1000)


def window(sizes: list[int], seed: int = 0) -> Window:
    """A first and a last special token, words of those sizes between them."""
    words = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.random.default_rng(seed).choice(ORDINARY, len(words))
    return Window(np.concatenate(([1], ids, [2])), np.concatenate(([-1], words, [-1])))


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=60)
RATIOS = st.tuples(st.floats(0.05, 0.8), st.floats(0.05, 0.8)).map(sorted)


@settings(max_examples=200, deadline=None)
@given(SIZES, RATIOS, st.integers(0, 2**32))
@example([1, 1], [0.5, 0.75], 0)  # 1.5 tokens round to all of them
def test_any_text_is_masked_by_whole_words_within_its_budgets(sizes, ratios, seed):
    text = window(sizes)
    found = Masking(MASK, ORDINARY, *ratios)(text, np.random.default_rng(seed))
    for mask, ratio in ((found.encoder_mask, ratios[0]), (found.decoder_mask, ratios[1])):
        for word in range(len(sizes)):
            assert len(set(mask[text.words == word])) == 1, "a word is masked in part"
        assert not mask[text.words < 0].any(), "a special token is masked"
        assert 1 <= mask.sum() <= max(round(ratio * sum(sizes)), max(sizes))
        assert mask.sum() < sum(sizes), "nothing is left to be seen"
    assert not (found.encoder_mask & ~found.decoder_mask).any()
    for ids, mask in ((found.encoder_ids, found.encoder_mask), (found.decoder_ids, found.decoder_mask)):
        assert (ids == text.ids)[~mask].all() and ids.shape == text.ids.shape
        assert np.isin(ids[mask], [MASK, *ORDINARY]).all()


def test_words_of_one_token_fill_both_budgets_to_the_token():
    rng = np.random.default_rng(0)
    for count in range(2, 200):
        found = Masking(MASK, ORDINARY)(window([1] * count), rng)
        assert found.encoder_mask.sum() == max(1, round(0.2 * count))
        assert found.decoder_mask.sum() == max(1, round(0.4 * count))


def test_shares_and_replacements_over_many_texts():
    """Words of 1 to 4 tokens: 20 and 40 % of the tokens, of which 80 % are hidden, 10 % replaced and 10 % kept."""
    rng, masking = np.random.default_rng(1), Masking(MASK, ORDINARY)
    texts = [window(list(rng.integers(1, 5, 60)), seed) for seed in range(600)]
    found = [masking(text, rng) for text in texts]
    total = sum((text.words >= 0).sum() for text in texts)
    for side, ratio in (("encoder", 0.2), ("decoder", 0.4)):
        masks = [getattr(m, f"{side}_mask") for m in found]
        assert sum(m.sum() for m in masks) / total == pytest.approx(ratio, abs=0.004)
        new = np.concatenate([getattr(m, f"{side}_ids")[mask] for m, mask in zip(found, masks, strict=True)])
        old = np.concatenate([text.ids[mask] for text, mask in zip(texts, masks, strict=True)])
        assert (new == MASK).mean() == pytest.approx(0.8, abs=0.01)
        assert (new == old).mean() == pytest.approx(0.1, abs=0.01)
        assert ((new != old) & (new != MASK)).mean() == pytest.approx(0.1, abs=0.01)
    # every place is masked as often as any other
    often = np.mean([masking(window([1] * 20), rng).encoder_mask for _ in range(4000)], 0)[1:-1]
    np.testing.assert_allclose(often, 0.2, atol=0.025)


def test_words_that_do_not_fit_are_passed_over():
    sizes = np.array([5, 1, 2, 1])
    assert chosen(np.array([1, 0, 2, 3]), sizes, 3).tolist() == [1, 2]
    assert chosen(np.array([0, 1, 2, 3]), sizes, 3).tolist() == [0]  # the first one is taken in any case
    assert chosen(np.array([0, 1, 2, 3]), sizes, 3, at_least=0).tolist() == [1, 2]
    assert chosen(np.array([0, 1]), sizes, 0, at_least=0).tolist() == []


@pytest.mark.parametrize("ratios", [(0.0, 0.4), (0.4, 0.2), (0.2, 1.0), (-0.1, 0.4), (float("nan"), 0.4)])
def test_ratios_that_cannot_be_are_refused(ratios):
    with pytest.raises(MaskingError, match="expected 0 < encoder_ratio <= decoder_ratio < 1"):
        Masking(MASK, ORDINARY, *ratios)
