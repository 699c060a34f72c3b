"""A long text that is read once into a cache of any kind, and questions that copies of the cache answer."""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nestling.kv.integration.attach import input_device, logits_of_last

STORY = """\
The lighthouse on Skerry Point was built of grey granite and stood forty metres high. For thirty-one years it had been
kept by a woman called Marit Olsen, who had come to the island as a girl with her father's fishing boat and never quite
managed to leave. Every evening she climbed the two hundred and twelve steps with a can of oil and a clean cloth, and
every morning she wrote the weather into a green notebook: the wind, the height of the waves, the ships that passed.
In the winter of the great storm the supply boat did not come for six weeks. Marit ate dried fish and potatoes, burned
the old furniture in the stove, and kept the lamp alight with the last of the oil. On the fortieth night a cargo ship,
the Halcyon, lost her engine in the channel and drifted towards the rocks. Her captain saw the beam, dropped both
anchors at the last moment, and saved all nineteen of his crew. When the sea grew calm, the sailors rowed to the island
with a gift. It was the ship's brass bell. It still hangs beside the door of the lighthouse, and children who visit the
island in summer are allowed to ring it once, for luck.

The light is electric now, and no one lives in the tower. But the green notebooks are in the museum in the harbour
town, forty-four of them on a shelf behind glass, and the last line of the last one reads: wind from the west, sea
quiet, nothing to report."""
QUESTIONS = (  # to the story, with the beginning and a word of the answer
    ("What did the sailors bring to the keeper of the lighthouse?", "They brought her the ship's", "brass bell"),
    ("What is the name of the woman who kept the lighthouse?", "Her name is", "Marit"),
    ("What was the name of the cargo ship?", "The cargo ship was called the", "Halcyon"),
)


def with_story(tokenizer, pages: Sequence[str], tokens: int) -> Tensor:
    """So many tokens ``[1, n]`` of pages, `STORY` in their middle; where ``tokens`` are few, the story alone."""
    story = tokenizer(f"\n\n{STORY}\n\n", add_special_tokens=False)["input_ids"]
    around = tokenizer("\n".join(pages), verbose=False)["input_ids"][: max(0, tokens - len(story))]
    middle = len(around) // 2
    return torch.tensor([around[:middle] + story + around[middle:]])


@torch.inference_mode()
def read(model, ids: Tensor, cache: Cache) -> Tensor:
    """The logits ``[V]`` after ids ``[1, n]``, which go through the cache in one call and stay in it."""
    return logits_of_last(model, ids.to(input_device(model)), cache).logits[0, -1]


def continuation(model, ids: Tensor, cache: Cache, most: int, ends: Collection[int] = ()) -> Iterator[int]:
    """The likeliest tokens after ids ``[1, n]``, one at a time; a copy of the cache reads them, itself stays as it is.

    Args:
        most: tokens at most.
        ends: tokens that end it and are not given.
    """
    own = deepcopy(cache)
    logits = read(model, ids, own)
    for number in range(most):
        token = int(logits.argmax())
        if token in ends:
            return
        yield token
        if number + 1 < most:
            logits = read(model, torch.tensor([[token]]), own)
