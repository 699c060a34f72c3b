"""Made-up sets to measure on."""

import torch

from nestling.data.retrieval import Retrieval

from .families import some_texts


def scored(count=40, seed=0):
    one, other = some_texts(count, seed), some_texts(count, seed + 1)
    other[:5] = one[5:10]  # sentences that occur twice; equal pairs would be ranked by rounding
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed)).mul(10).round().div(2).tolist()
    return [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in zip(one, other, scores, strict=True)]


def searched(documents=130, queries=12, seed=0):
    corpus = {str(i): text for i, text in enumerate(some_texts(documents, seed + 2))}
    asked = {f"q{i}": text for i, text in enumerate(some_texts(queries, seed + 3))}
    rng = torch.Generator().manual_seed(seed)
    relevant = {key: {str(d): 1.0 for d in torch.randperm(documents, generator=rng)[:3].tolist()} for key in asked}
    return Retrieval("made", corpus, asked, relevant)
