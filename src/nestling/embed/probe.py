"""Texts that two versions of an encoder are compared on."""

import random

from sentence_transformers import SentenceTransformer

SENTENCES = (
    "Water.",
    "The lighthouse keeper wrote down the weather every evening.",
    "How many layers does a small encoder need before its vectors are of any use in a search engine?",
)
LENGTHS = (1, 2, 5, 13, 40)  # tokens
SEED = 0


def probe_texts(model: SentenceTransformer) -> list[str]:
    """Sentences, and random tokens of the model's own vocabulary in several lengths, so that any tokenizer is served.

    The same for the same model. Longer texts than the model reads are among them if it reads fewer than 40 tokens.
    """
    tokenizer = model.tokenizer
    usual = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    rng = random.Random(SEED)
    made = [tokenizer.decode(rng.sample(usual, min(length, len(usual)))) for length in LENGTHS]
    return [*SENTENCES, *(text for text in made if text.strip())]
