"""lm-eval under a nested cache: ``python -m nestling.integrations.lm_eval run --model nestling --model_args ...``.

lm-eval's own model reads every question in one forward, which attends to exact keys and values: its numbers would be
those of the full model at every budget. Here contexts go through the cache, in chunks, and what is scored or generated
attends to them as they are stored.
"""

import copy
import logging
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from nestling.errors import NestlingError, OptionError
from nestling.integrations.libraries import library
from nestling.kv import CacheConfig, KVAdapter, NestedCache, attach, score
from nestling.kv.cache.factory import planned
from nestling.kv.cache.rule import capacity
from nestling.kv.evaluation.scoring import read
from nestling.kv.integration.attach import cached
from nestling.models import locate
from nestling.options import whole

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
else:
    HFLM = library("lm_eval.models.huggingface", "lm-eval", "lm-eval").HFLM

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # what was asked, ids of the context and continuation
ROWS = 16  # continuations of a context that are read at once
STEM = 64  # contexts that begin with as many equal tokens share what is read of them
OURS = {field.name for field in fields(CacheConfig)} - {"dtype", "exact_prompt"}
REFUSED = {
    "exact_prompt": "prompts are always read compressed, or nothing would be measured",
    "mixed_precision_dtype": "caches are outside of autocast; choose the dtype of the weights instead",
}
log = logging.getLogger(__name__)


@library("lm_eval.api.registry", "lm-eval", "lm-eval").register_model("nestling")
class NestlingLM(HFLM):
    """lm-eval's model of a folder or hub id, whose contexts are read through a nested cache.

    Multiple choice reads a context once for all its choices, and contexts that begin alike (few-shot examples) share
    what is read of their beginning. Results have what the caches held, under ``config`` and ``nestling``.

    Args:
        pretrained: as for ``hf``, or ``smollm2``.
        adapter: folder or hub id of the model's adapter, or one that comes with nestling.
        chunk: tokens that go through a cache at once.
        options: ``budget``, ``window`` and the other options of a `CacheConfig`, of which ``dtype`` is called
            ``cache_dtype``; all others go to ``hf``.

    Raises:
        AdapterError, BudgetError, LoadError, OptionError: the adapter, budget, model or an option is of no use.
    """

    def __init__(self, pretrained: Any, adapter: str, chunk: int = 64, **options: Any):
        for name in REFUSED.keys() & options.keys():
            raise OptionError(f"{name}={options[name]!r} cannot be set: {REFUSED[name]}")
        self.chunk = whole("chunk", chunk)
        ours = {name: options.pop(name) for name in OURS & options.keys()}
        self.cache_config = CacheConfig(**ours, dtype=options.pop("cache_dtype", None), exact_prompt=False)
        self.reads: list[tuple[int, int, int]] = []  # tokens of a text, bytes held of it, bytes of a full cache
        self.warned = False
        if isinstance(pretrained, str) and isinstance(place := locate(pretrained), Path) and place.is_dir():
            pretrained = str(place)
        super().__init__(pretrained, **options)
        self.adapter_name, self.adapter = adapter, KVAdapter.from_pretrained(adapter)
        NestedCache(self.model, self.adapter, self.cache_config)  # what cannot be is refused now
        attach(self.model)

    def make_cache(self) -> Cache:
        """A new cache for one text."""
        return NestedCache(self.model, self.adapter, self.cache_config)

    def cache_bytes(self, cache: Cache) -> tuple[int, int]:
        """Bytes that a cache of `make_cache` holds, and those of a full one of 16 bits for the same tokens."""
        assert isinstance(cache, NestedCache)
        return cache.nbytes, cache.full_nbytes

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        bar = library("tqdm", "lm-eval").tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="reading through nested caches"
        )
        for context, stem, rows in self._groups(requests):
            batch: list[Cache] = []

            def make(stem: Cache | None = stem, batch: list[Cache] = batch) -> Cache:
                batch.append(self.make_cache() if stem is None else copy.deepcopy(stem))
                return batch[-1]

            scores = score(self.model, make, context, [rest for _, rest in rows], self.chunk)
            for (number, _), (total, greedy, _) in zip(rows, scores, strict=True):
                results[number] = total, greedy
                if (asked := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, results[number])
            self._note(batch[-1])
            bar.update(len(rows))
        bar.close()
        self._warn()
        return results  # type: ignore[return-value]

    def _groups(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[list[int], Cache | None, list[tuple[int, list[int]]]]]:
        """What is left to read of a context, a cache that has read the rest, and the continuations by number."""
        cut = []
        for number, (_, context, rest) in enumerate(requests):
            ids = (list(context) + list(rest))[-(self.max_length + 1) :]  # as lm-eval does: from the left
            if len(rest) >= len(ids):
                raise OptionError(f"max_length={self.max_length}: a continuation of {len(rest)} tokens does not fit")
            cut.append((ids[: -len(rest)], len(rest), number, ids[-len(rest) :]))
        for _, beginning in groupby(sorted(cut), key=lambda row: row[0][:STEM]):
            alike = list(beginning)
            stem = os.path.commonprefix([alike[0][0], alike[-1][0]])
            stem = stem[: min(len(context) for context, *_ in alike) - 1]
            cache = None
            if len(stem) >= STEM and len(alike) > 1:
                cache = self.make_cache()
                with torch.no_grad():
                    read(self.model, torch.tensor([stem]), cache, self.chunk)
            for context, group in groupby(alike, key=lambda row: row[0]):
                rows = [(number, rest) for _, _, number, rest in group]
                for start in range(0, len(rows), ROWS):
                    yield context[len(stem) if cache else 0 :], cache, rows[start : start + ROWS]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        cache = self.make_cache()
        options |= {**cached(self.model, cache), "prefill_chunk_size": self.chunk}
        texts = super()._model_generate(context, max_length=max_length, stop=stop, **options)
        self._note(cache)
        self._warn()
        return texts

    def _note(self, cache: Cache) -> None:
        self.reads.append((cache.get_seq_length(), *self.cache_bytes(cache)))

    def _warn(self) -> None:
        """Say once that texts are so short that nothing of them is compressed."""
        if not self.reads:
            return
        median = int(statistics.median(tokens for tokens, *_ in self.reads))
        exact = capacity(self.cache_config.sinks, planned(self.adapter, self.cache_config).window, median)
        if median <= exact and not self.warned:
            self.warned = True
            log.warning(
                "The median text has %d tokens, and up to %d are exact (sinks and window): this measures next to "
                "nothing of the cache. Give more few-shot examples, or a smaller window.",
                *(median, exact),
            )

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own, and under ``nestling`` what the caches were and held; shares are of bytes of all texts."""
        held, full = (sum(column) for column in list(zip(*self.reads, strict=True))[1:] or [(0,), (0,)])
        options = {name: value for name, value in self.cache_config.to_dict().items() if value is not None}
        ours = {
            "adapter": str(self.adapter_name),
            **{name: value if isinstance(value, int | float) else str(value) for name, value in options.items()},
            "chunk": self.chunk,
            "texts": len(self.reads),
            "median_tokens": statistics.median(tokens for tokens, *_ in self.reads) if self.reads else 0,
            "held_share": held / full if full else None,
        }
        return {**super().get_model_info(), "nestling": ours}


def main() -> None:
    """lm-eval's command line, in which ``--model nestling`` is known."""
    try:
        library("lm_eval.__main__", "lm-eval", "lm-eval").cli_evaluate()
    except NestlingError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
