"""Quality of compressed caches: KL, perplexity and top-1 agreement with the full model, multiple choice, recall.

Every method is measured in the same way. It is a `Candidate`, which makes empty caches; text goes through its cache in
chunks, so that a history is read as it is stored; and its bytes are those of the storage that it really holds.
Multiple choice hides damage to a cache (it can keep its accuracy while the KL is past 1): read KL and agreement first.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

from nestling.data.texts import read_multiple_choice, read_texts
from nestling.data.windows import token_windows
from nestling.errors import DataError, EvaluationError
from nestling.jobs.progress import progress_bar
from nestling.jobs.results import ResultStore
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocation.allocate import ENERGY, quantises
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.rule import check_length
from nestling.kv.cache.window import LEAST
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.loss import loss_columns
from nestling.kv.evaluation.scoring import choice_scores, forward, read
from nestling.kv.evaluation.tasks import encode_question, growing, held_bytes, number_answer, passkey_prompts
from nestling.kv.integration.attach import (
    attach,
    input_device,
    leaves_as_found,
    longest_text,
    stock_layers,
    text_config,
)
from nestling.kv.integration.modes import in_default_mode
from nestling.losses import kl_divergence
from nestling.options import flag

SUMS = 5  # numbers of a window before its losses


@dataclass(frozen=True)
class Candidate:
    """A method that is measured.

    Attributes:
        method: its name in the results, such as ``"balanced-energy"`` or ``"int4"``.
        budget: the share of a full cache that it was asked to take; None if it has no such setting.
        make: gives a fresh, empty cache for one sequence.
    """

    method: str
    budget: float | None
    make: Callable[[], Cache]

    @property
    def name(self) -> str:
        return self.method if self.budget is None else f"{self.method} at {self.budget:g}"


@leaves_as_found
@in_default_mode
def evaluate(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor | None,
    adapter: KVAdapter,
    config: EvalConfig | None = None,
    *,
    progress: bool = True,
    store: ResultStore | None = None,
) -> list[dict[str, Any]]:
    """Measure an adapter's caches at several budgets against the full model.

    Args:
        model: the causal LM of the adapter; switched to nestling's attention.
        tokenizer, texts, progress, store: see `compare`.
        config: what is measured, and of which caches. Budgets are not used if the allocation is a table.

    Returns:
        Flat rows as from `compare`, the full model's first.

    Raises:
        OptionError: if an option has a value that it cannot have.
        AdapterError, BudgetError, TextTooShortError, EvaluationError.
    """
    config = EvalConfig.of(config)
    adapter.check(model)
    quantised = quantises(adapter, config.allocation, config.quantise)
    usual = ENERGY if quantised else adapter.allocation
    allocation = usual if config.allocation is None else config.allocation
    named = isinstance(allocation, str)
    method = _method(adapter, allocation if named else "ranks") + "-bits" * quantised
    options = {name: getattr(config, name) for name in ("sinks", "window", "exact_prompt", "dtype")}
    options |= {"quantise": config.quantise, "context": config.context or config.length}
    sizes: list[Any] = config.budgets if named else [allocation]
    configs = [CacheConfig(budget=size, allocation=allocation if named else None, **options) for size in sizes]
    if config.context is None and any(named and size.share != 1 for size in sizes):
        check_length(config.length, config.sinks, LEAST if config.window is None else config.window)
    candidates = [
        Candidate(method, size.share if named else None, bind(NestedCache, model, adapter, cache))
        for size, cache in zip(sizes, configs, strict=True)
    ]
    attach(model)
    return compare(model, tokenizer, texts, candidates, config, progress=progress, store=store)


def _method(adapter: KVAdapter, allocation: str) -> str:
    """The name in results: basis and allocation, or the preset that it was trained with, at the trained allocation."""
    if training := adapter.info.get("training"):
        return training["preset"] if allocation == training["allocation"] else f"{training['preset']}-{allocation}"
    basis = adapter.info.get("basis", "nested")
    return f"{basis if isinstance(basis, str) else 'auto'}-{allocation}"


@leaves_as_found
@in_default_mode
@torch.no_grad()
def compare(
    model,
    tokenizer,
    texts: Iterable[str] | Tensor | None,
    candidates: Sequence[Candidate],
    config: EvalConfig | None = None,
    *,
    progress: bool = True,
    store: ResultStore | None = None,
) -> list[dict[str, Any]]:
    """Measure caches of any kind against the full model, all on the same tokens.

    The logits of a window are held once, ``[length, vocabulary]``, while each candidate reads it.

    Args:
        tokenizer: None will do for ``texts`` of token ids without tasks and passkeys.
        texts: strings or token ids ``[n, T]``, packed into windows; None: the built-in English pages.
        candidates: methods; pairs of method and budget must differ. The full model is added in front.
        config: what is measured: windows, length, chunk, tasks, passkey.
        progress: show progress bars with an estimate of the time left.
        store: where sums are kept, after each window and each task and candidate. Give one with a file to resume.

    Returns:
        A row a candidate: ``model, method, budget, bytes_share`` (bytes held over those of a full bf16 cache, on the
        longest window or prompt; layers with a window of their own, which do not grow, are left out of both),
        ``bytes_per_token, kl`` (mean nats per token to the full model) and what
        `nestling.kv.evaluation.loss.loss_columns` has beside it, ``ppl, top1`` (share of positions with the full
        model's first choice), ``next_token`` (share whose first choice is the next token of the text),
        ``acc_<task>, above_chance`` (what the mean accuracy of the tasks is above chance, as a share of what the full
        model's is; None if that is not) and ``passkey_<n>`` (share that was answered). What was not measured is
        absent or None.

    Raises:
        OptionError: if an option has a value that it cannot have.
        TextTooShortError: if there is not one window of text.
        EvaluationError: for logits that are not finite, naming the candidate; for questions, prompt lengths or
            candidates that cannot be measured.
    """
    config, progress = EvalConfig.of(config), flag("progress", progress)
    lm_config = text_config(model)
    tasks = {task: _questions(task, rows) for task, rows in (config.tasks or {}).items()}
    candidates = [Candidate("full", None, lambda: Cache(layers=stock_layers(lm_config))), *candidates]
    names = [c.name for c in candidates]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise EvaluationError(f"method and budget must differ between candidates, repeated: {sorted(repeated)}")
    if (tasks or config.passkey) and tokenizer is None:
        raise EvaluationError("tasks and passkeys are text, so a tokenizer is needed")
    if empty := [task for task, rows in tasks.items() if not rows]:
        raise EvaluationError(f"task {empty[0]} has no questions")
    for candidate in candidates:
        candidate.make()  # a budget out of reach fails now, not after an hour
    ids = []
    if config.windows:
        length = min(config.length, longest_text(lm_config) or config.length)
        texts = read_texts(None) if texts is None else texts
        ids = list(token_windows(tokenizer, texts, length, limit=config.windows))
    questions = {task: [encode_question(tokenizer, row) for row in rows] for task, rows in tasks.items()}
    prompts = {f"passkey_{n}": passkey_prompts(tokenizer, n) for n in config.passkey}
    run = _Run(model, tokenizer, candidates, config.chunk, store or ResultStore())
    training = model.training
    model.eval()
    try:
        with progress_bar(progress) as bar:
            jobs = [(f"text, {len(ids)} windows", len(ids), bind(run.windows, ids))] if ids else []
            jobs += [(task, len(rows), bind(run.task, task, tasks[task], rows)) for task, rows in questions.items()]
            jobs += [(name, len(rows), bind(run.recall, name, rows)) for name, rows in prompts.items()]
            bars = [bar.add_task(name, total=total * len(candidates)) for name, total, _ in jobs]
            for task_id, (_, _, job) in zip(bars, jobs, strict=True):
                job(bind(bar.advance, task_id))
    finally:
        model.train(training)
    name = Path(lm_config.name_or_path).name if lm_config.name_or_path else lm_config.model_type
    return [{"model": name, "method": c.method, "budget": c.budget, **run.row(c)} for c in candidates]


def _questions(task: str, rows: Any) -> list[dict[str, Any]]:
    try:
        return [] if isinstance(rows, list) and not rows else read_multiple_choice(rows)
    except DataError as error:
        raise EvaluationError(f"{task}: {error}") from error


class _Run:
    """One comparison: ``results[candidate]`` gathers the columns of its row."""

    def __init__(self, model, tokenizer, candidates: list[Candidate], chunk: int, store: ResultStore):
        self.model, self.tokenizer, self.candidates = model, tokenizer, candidates
        self.chunk, self.store, self.device = chunk, store, input_device(model)
        self.results: dict[str, dict[str, Any]] = {
            c.name: {"bytes_share": None, "bytes_per_token": None} for c in candidates
        }
        self.chance: dict[str, float] = {}
        self.longest = 0

    def key(self, candidate: Candidate, what: str, data) -> str:
        return f"{candidate.name} | {what} | {zlib.crc32(repr(data).encode()):08x} | chunk {self.chunk}"

    def check(self, candidate: Candidate, where: str, values: Iterable[float]) -> None:
        if not all(map(math.isfinite, values)):
            raise EvaluationError(f"{candidate.name}: the logits are not finite (NaN or infinity) in {where}")

    def stock_bytes(self, ids: Tensor) -> list[float]:
        """What a stock cache of ``ids`` ``[n]`` holds: bytes of storage, and bytes in bf16 without slack."""
        key = f"stock cache of {len(ids)} tokens"
        if key not in self.store.done:
            cache = self.candidates[0].make()
            read(self.model, ids[None].to(self.device), cache, self.chunk)
            states = [getattr(layer, side, None) for layer in growing(cache) for side in ("keys", "values")]
            elements = sum(state.numel() for state in states if isinstance(state, Tensor))
            self.store.done[key] = [held_bytes(cache, bounded=False), 2 * elements]
        return self.store.numbers(key, 2)

    def set_bytes(self, candidate: Candidate, ids: Tensor, held: float) -> None:
        """Bytes of a cache that has read ``ids`` ``[n]``, unless those of a longer text are known."""
        if len(ids) > self.longest:
            share = held / self.stock_bytes(ids)[1]
            self.results[candidate.name].update(bytes_share=share, bytes_per_token=held / len(ids))

    def windows(self, windows: list[Tensor], advance: Callable[[int], None]) -> None:
        done = self.store.done
        rows: dict[str, list[list[float]]] = {c.name: [] for c in self.candidates}
        for number, window in enumerate(windows):
            keys = {c.name: self.key(c, "text", window.tolist()) for c in self.candidates}
            ids, todo = window.to(self.device), [c for c in self.candidates if keys[c.name] not in done]
            advance(len(self.candidates) - len(todo))
            teacher = self.model(input_ids=ids[None], use_cache=False).logits[0] if todo else ids
            for c in todo:
                done[keys[c.name]] = self.window(c, ids, teacher, f"window {number + 1}")
                advance(1)
            if todo:
                self.store.save()
            for c in self.candidates:
                rows[c.name].append(self.store.numbers(keys[c.name], SUMS + len(window)))
        for c in self.candidates:
            measured = torch.tensor(rows[c.name], dtype=torch.float64)
            nll, hits, right, labels, nbytes = measured[:, :SUMS].sum(0).tolist()
            kl = measured[:, SUMS:]
            self.set_bytes(c, windows[0], nbytes / len(windows))
            ppl, next_token = math.exp(min(nll / max(labels, 1), 700)), right / max(labels, 1)
            self.results[c.name].update(**loss_columns(kl), ppl=ppl, top1=hits / kl.numel(), next_token=next_token)
        self.longest = max(self.longest, len(windows[0]))

    def window(self, candidate: Candidate, ids: Tensor, teacher: Tensor, where: str) -> list[float]:
        """Of a window: sums of negative log-likelihood, agreements, right next tokens and labels; the bytes held
        at its end; and the KL of each token."""
        cache, sums, kl, start = candidate.make(), torch.zeros(4, dtype=torch.float64), [], 0
        full = candidate is self.candidates[0]  # it reads without a cache
        parts = () if full else ids[None].split(self.chunk, 1)
        chunks = [teacher] if full else (forward(self.model, part, cache)[0] for part in parts)
        for logits in chunks:
            end = start + len(logits)
            expected, labels = teacher[start:end], ids[start + 1 : end + 1].to(logits.device)
            kl += kl_divergence(expected, logits).tolist()
            nll = float(cross_entropy(logits[: len(labels)].float(), labels, reduction="none").double().sum())
            chosen = logits.argmax(-1)
            hits, right = int((chosen == expected.argmax(-1)).sum()), int((chosen[: len(labels)] == labels).sum())
            self.check(candidate, f"{where}, tokens {start} to {end - 1}", (nll, *kl[start:]))
            sums += torch.tensor([nll, hits, right, len(labels)], dtype=torch.float64)
            start = end
        nbytes = self.stock_bytes(ids)[0] if full else held_bytes(cache, bounded=False)
        return [*sums.tolist(), nbytes, *(float(f"{value:.7g}") for value in kl)]

    def task(self, task: str, rows: Sequence[dict], encoded: list, advance: Callable[[int], None]) -> None:
        answers = [row["answer"] for row in rows]
        self.chance[task] = sum(1 / len(pairs) for pairs in encoded) / len(rows)
        for c in self.candidates:
            key = self.key(c, task, (encoded, answers))
            if key in self.store.done:
                advance(len(rows))
            else:
                right = 0
                for number, (pairs, answer) in enumerate(zip(encoded, answers, strict=True)):
                    scores = choice_scores(self.model, c.make, pairs, self.chunk)
                    self.check(c, f"{task}, question {number + 1}", scores)
                    right += scores.index(max(scores)) == answer
                    advance(1)
                self.store.done[key] = [right]
                self.store.save()
            self.results[c.name][f"acc_{task}"] = self.store.numbers(key, 1)[0] / len(rows)

    def recall(self, name: str, prompts: list[tuple[Tensor, str]], advance: Callable[[int], None]) -> None:
        """Prompts whose answer is a number; their share of right ones is in the column ``name``."""
        for c in self.candidates:
            key = self.key(c, name, [(ids.tolist(), digits) for ids, digits in prompts])
            if key in self.store.done:
                advance(len(prompts))
            else:
                right, check = 0, bind(self.check, c, name)
                for ids, digits in prompts:
                    answer, size = number_answer(self.model, self.tokenizer, ids, c.make(), self.chunk, check)
                    right += answer == digits
                    advance(1)
                self.store.done[key] = [right, size]
                self.store.save()
            hits, nbytes = self.store.numbers(key, 2)
            self.results[c.name][name] = hits / len(prompts)
            self.set_bytes(c, prompts[-1][0], nbytes)
        self.longest = max(self.longest, len(prompts[-1][0]))

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """The columns of a candidate, with ``above_chance`` after the tasks."""
        row, full = self.results[candidate.name], self.results[self.candidates[0].name]
        if not self.chance:
            return row
        kept, gain = (sum(r[f"acc_{t}"] - chance for t, chance in self.chance.items()) for r in (row, full))
        keys = [k for k in row if not k.startswith("passkey_")]
        late = {k: v for k, v in row.items() if k not in keys}
        return {k: row[k] for k in keys} | {"above_chance": kept / gain if gain > 0 else None} | late
