"""`nestling demo kv`: a long text is read once at three sizes and asked about, beside what each of them costs."""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TextStreamer
from transformers.cache_utils import Cache, DynamicCache, HQQQuantizedLayer

from nestling.data.texts import read_texts
from nestling.errors import OptionError
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import built_in
from nestling.kv.cache.cache import NestedCache
from nestling.kv.cache.config import CacheConfig
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.fit import fit
from nestling.kv.document import QUESTIONS, continuation, read, with_story
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, compare
from nestling.kv.integration.attach import cached, input_device, text_config
from nestling.kv.quantisation.cpu import compiled
from nestling.kv.report import COLUMNS, about, map_section, quality_section
from nestling.models import load_model
from nestling.report.figures import bars
from nestling.report.page import Section, write_html
from nestling.report.results import run_meta
from nestling.report.tables import table
from nestling.visible import visible_lines

SIZES = (0.25, 0.125)  # of caches that are asked, beside the full one
MEASURED = (0.5, 0.25, 0.125, 0.1)  # that KL is measured at
TOKENS = 24576  # of a calibration
ANSWER = 10  # tokens
STEPS = 12  # of decoding that are timed


def stream(
    model,
    tokenizer,
    prompt: str,
    cache: NestedCache,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer=None,
) -> str:
    """Generate to the terminal and return one line: cache bytes, full bytes, tokens per second.

    The tokenizer's chat template is applied if it has one. ``streamer`` replaces the terminal.
    """
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[-1]:
        raise OptionError("the prompt is empty")
    inputs = inputs.to(input_device(model))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = streamer or _Plain(tokenizer)
    start = time.perf_counter()
    arguments = {**inputs, **cached(model, cache), **sampling}
    out = model.generate(**arguments, max_new_tokens=max_new_tokens, streamer=streamer)
    seconds = time.perf_counter() - start
    new = out.shape[-1] - inputs["input_ids"].shape[-1]
    return (
        f"cache {cache.nbytes / 2**20:.2f} MiB held for {cache.get_seq_length()} tokens, full cache "
        f"{cache.full_nbytes / 2**20:.2f} MiB, {new} tokens at {new / seconds:.1f} tokens/s"
    )


def run(model: str, out: Path, context: int, tokens: int, console: Console) -> list[dict]:
    """The demo: read, ask, measure, and write the report.

    The adapter is the one that comes with the package, if it has one for the model; with ``tokens``, one that is
    calibrated on as many.

    Args:
        context: tokens of the text that is read.

    Returns:
        A row for each cache that was asked: ``size, mib, share, prefill_seconds, decode_ms, right``; and those of KL.
    """
    start = time.perf_counter()
    with console.status(f"loading {model}"):
        language_model, tokenizer = load_model(model)
    pages = list(read_texts(None))
    if not tokens and model in built_in():
        adapter = KVAdapter.from_pretrained(model)
        console.print(f"The adapter of the package, trained on {adapter.info['training']['tokens']:,} tokens.")
    else:
        began = time.perf_counter()
        rest = [page for i, page in enumerate(pages) if i % 8]
        adapter = fit(language_model, tokenizer, rest, FitConfig(tokens=tokens or TOKENS))
        console.print(f"Calibrated on {adapter.info['tokens']:,} tokens in {time.perf_counter() - began:.0f} s.")
    nested = partial(_nested, language_model, adapter)
    config = text_config(language_model)
    sizes: dict[str, Callable[[], Any]] = {"full": lambda: DynamicCache(config=config)}
    sizes |= {f"{100 * share:.3g}%": partial(nested, share, context=context) for share in SIZES}
    ids = with_story(tokenizer, pages[1::8], context)
    compiled()
    console.print(
        f"{ids.shape[1]:,} tokens of Python's help pages, with a story about a lighthouse in their midst, are read "
        "once at each size. The questions come afterwards, so that they can only be answered from the cache."
    )
    if context > (limit := adapter.info.get("context", context)):
        console.print(
            f"The adapter was made for texts of up to {limit:,} tokens. In longer ones small caches lose what stands "
            "far back: make one by `nestling kv fit` with a larger --context."
        )
    rows: list[dict[str, Any]] = []
    answers, caches = {}, {}
    for name, make in sizes.items():
        with console.status(f"reading and answering at {name}"):
            read(language_model, ids[:, :300], make())  # what is slow the first time is not measured
            caches[name], seconds = _filled(language_model, ids, make)
            answers[name] = _answers(language_model, tokenizer, caches[name])
        rows.append({"size": name, "prefill_seconds": seconds, "right": sum(right for _, right in answers[name])})
    cache = caches[name]
    for row, milliseconds in zip(rows, _decode_times(language_model, caches), strict=True):
        nbytes = getattr(caches[row["size"]], "nbytes", cache.full_nbytes)
        row |= {"mib": nbytes / 2**20, "share": nbytes / cache.full_nbytes, "decode_ms": milliseconds}
    drawn = [{**row, "bar": "█" * round(20 * row["share"]) or "▏"} for row in rows]
    console.print(table(drawn, ASKED, title=f"{model}: one text of {ids.shape[1]:,} tokens, in caches of three sizes"))
    console.print(table(_by_question(answers), title="Answers"))
    measured = _measure(language_model, tokenizer, nested, pages[::8], console)
    console.print(table(measured, COLUMNS, title="What a smaller cache costs on other pages"))
    _write(
        out,
        model,
        adapter,
        (rows, answers, measured),
        (cache.allocation, name),
        time.perf_counter() - start,
    )
    console.print(f"Report: {out}")
    return [*rows, *measured]


ASKED = {
    "size": "cache", "bar": "memory", "mib": "MiB", "share": "of bf16", "prefill_seconds": "prefill s",
    "decode_ms": "ms a token", "right": f"right of {len(QUESTIONS)}",
}  # fmt: skip


def _nested(model, adapter: KVAdapter, share: float, **options: Any) -> NestedCache:
    return NestedCache(model, adapter, CacheConfig(budget=share, dtype=torch.bfloat16, **options))


def _filled(model, ids: Tensor, make: Callable[[], Any]) -> tuple[Any, float]:
    """A cache that has read the text in one call, and the seconds that it took."""
    cache, start = make(), time.perf_counter()
    read(model, ids, cache)
    return cache, time.perf_counter() - start


def _answers(model, tokenizer, cache: Cache) -> list[tuple[str, bool]]:
    """The answer to each question, by a copy of the cache, and whether it is right."""
    answers = []
    for question, beginning, word in QUESTIONS:
        asked = f"\n\nQuestion: {question}\nAnswer: {beginning}"
        ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
        said = list(continuation(model, ids, cache, ANSWER))
        answer = " ".join(tokenizer.decode(said, skip_special_tokens=True).split())
        answers.append((" ".join(f"{beginning} {answer}".split(".")[0].split()), word in answer))
    return answers


def _decode_times(model, caches: dict[str, Cache]) -> list[float]:
    """Milliseconds a token of each cache: medians of steps in turns, so that other work slows all alike."""
    copies = [deepcopy(cache) for cache in caches.values()]
    times: list[list[float]] = [[] for _ in copies]
    for _ in range(STEPS):
        for cache, taken in zip(copies, times, strict=True):
            start = time.perf_counter()
            read(model, torch.zeros(1, 1, dtype=torch.long), cache)
            taken.append(1e3 * (time.perf_counter() - start))
    return [median(taken) for taken in times]


def _by_question(answers: dict[str, list[tuple[str, bool]]]) -> list[dict[str, str]]:
    return [
        {"question": question} | {name: f"{said[i][0]} {'✓' if said[i][1] else '✗'}" for name, said in answers.items()}
        for i, (question, _, _) in enumerate(QUESTIONS)
    ]


def _measure(model, tokenizer, nested, pages: list[str], console: Console) -> list[dict]:
    """KL on pages that were not calibrated on: ours at several budgets, and plain integers where they can be had."""
    config = EvalConfig(windows=1)
    candidates = [
        Candidate("nestling", share, partial(nested, share, exact_prompt=False, context=config.length))
        for share in MEASURED
    ]
    layers = text_config(model).num_hidden_layers
    for bits in (8, 4):
        make = partial(_integers, layers, bits)
        try:
            make()
        except (ImportError, ValueError) as error:
            console.print(f"int{bits} is left out: {error}", style="dim")
        else:
            candidates.append(Candidate(f"int{bits}, hqq", None, make))
    return compare(model, tokenizer, pages, candidates, config)


def _integers(layers: int, bits: int) -> Cache:
    """transformers' quantised cache by hqq, along its better axis: groups of 64, up to 127 recent tokens exact."""
    return Cache(layers=[_HQQ(nbits=bits, axis_key=1, axis_value=1) for _ in range(layers)])


class _HQQ(HQQQuantizedLayer):
    """It keeps scales and recent tokens in the dtype that it is given: 16 bits, whatever the model computes in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.bfloat16(), value_states.bfloat16(), *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)


def _write(out: Path, model: str, adapter: KVAdapter, results, smallest, seconds: float) -> None:
    rows, answers, measured = results
    figure = bars({row["size"]: row["mib"] for row in rows}, title="Memory of the cache", label="MiB")
    columns = {key: header for key, header in ASKED.items() if key != "bar"}
    memory = (
        "The same text in three caches. Prefill is the time to read it, decode that of one more token; the full cache "
        "is counted in bf16."
    )
    asked = "Each question was asked after the text was read: the answer can only come from the cache."
    sections = [
        Section("Memory and time", memory, rows=rows, columns=columns, figure=figure),
        Section("Answers", asked, rows=_by_question(answers)),
        quality_section(measured),
        map_section(*smallest),
    ]
    write_html(out, f"nestling: {model} with a smaller KV cache", about(adapter), sections, run_meta(seconds))


class _Plain(TextStreamer):
    """Streams the answer to the terminal; control characters in it are spelled out."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible_lines(text), stream_end)
