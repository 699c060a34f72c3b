"""What the command line shows: streamed generation, rank tables and maps, the report, and the demo end to end."""

import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import TextStreamer

from nestling.data.texts import read_texts
from nestling.errors import OptionError
from nestling.kv.adapter import KVAdapter
from nestling.kv.adapter_files import built_in
from nestling.kv.allocation.ranks import RankTable
from nestling.kv.cache.cache import NestedCache
from nestling.kv.calibration.config import FitConfig
from nestling.kv.calibration.fit import fit
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import evaluate
from nestling.kv.integration import attach as attention
from nestling.models import load_model
from nestling.report.figures import curve, heat_maps
from nestling.report.page import Section, write_html
from nestling.report.results import run_meta
from nestling.report.tables import table
from nestling.visible import visible_lines

BUDGETS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.4, 0.25)
BITS = (0.3125, 0.25, 0.1875, 0.125)  # budgets with quantised coordinates
ANSWERS = (1.0, 0.5, 0.4)
SHRINK = (0.25, 0.125)  # with quantised coordinates: at first, and from the 20th token of the answer on
SHRINK_AT = 20
TOKENS = 24576  # of a calibration
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
PROMPT = f"{STORY}\n\nWhat did the sailors give to the keeper of the lighthouse, and why?"
COLUMNS = {
    "method": "method", "budget": "budget", "bytes_per_token": "bytes/token", "bytes_share": "of bf16",
    "kl": "KL", "ppl": "perplexity", "top1": "top-1",
}  # fmt: skip


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
    inputs = inputs.to(attention.input_device(model))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = streamer or _Plain(tokenizer)
    start = time.perf_counter()
    arguments = {**inputs, **attention.cached(model, cache), **sampling}
    out = model.generate(**arguments, max_new_tokens=max_new_tokens, streamer=streamer)
    seconds = time.perf_counter() - start
    new = out.shape[-1] - inputs["input_ids"].shape[-1]
    return (
        f"cache {cache.nbytes / 2**20:.2f} MiB held for {cache.get_seq_length()} tokens, full bf16 cache "
        f"{cache.full_nbytes / 2**20:.2f} MiB, {new} tokens at {new / seconds:.1f} tokens/s"
    )


def rank_rows(adapter: KVAdapter, ranks: RankTable) -> list[dict]:
    """One row a compressed layer: its index, the ranks of its heads, and the number of rank groups it is stored in."""
    keys, values = ranks.keys.tolist(), ranks.values.tolist()
    return [
        {"layer": layer, "keys": keys[row], "values": values[row], "groups": len(ranks.groups(row))}
        for row, layer in enumerate(adapter.fingerprint["layers"])
    ]


def rank_maps(adapter: KVAdapter, ranks: RankTable, title: str):
    """Heat maps of the ranks of keys and of values, layers downwards (a matplotlib Figure)."""
    panels = {"keys": ranks.keys, "values": ranks.values}
    return heat_maps(panels, title=title, row_label="layer", col_label="KV head", vmax=adapter.shape[2])


def shade(share: float) -> str:
    """A background colour for the terminal, darker green for a larger share."""
    return f"rgb({int(40 * (1 - share))},{int(40 + 90 * share)},{int(60 * (1 - share))})"


def write_report(
    path: Path,
    adapter: KVAdapter,
    rows: list[dict],
    budgets,
    *,
    title: str,
    answers: dict[str, tuple[str, str]] | None = None,
) -> None:
    """One HTML page: the table of budgets, KL against bytes, the answers if there are any, and the rank maps."""
    measured = [r for r in rows if r["method"] != "full"]
    figure = curve(
        measured, "bytes_share", "kl", "method", title="What a smaller cache costs", percent_x=True,
        xlabel="bytes held, share of the full bf16 cache", ylabel="KL to the full model (nats per token)",
    )  # fmt: skip
    sections = [
        Section(
            "Quality against bytes",
            "KL (nats per token) is the distance of the predictions to those of the full cache, on text that was not "
            "calibrated on; the history is read compressed, as in decoding. Top-1 is how often the first choice is "
            "the full model's. Bytes are those of the storage really held, beside a full cache in bf16; a model that "
            "computes in fp32 holds twice that by itself.",
            rows=rows, columns=COLUMNS, figure=figure,
        )
    ]  # fmt: skip
    for size, (answer, note) in (answers or {}).items():
        sections.append(Section(f"The same prompt at {size}", note, pre=answer))
    for budget in [b for b in budgets if b < 1 and b in (0.75, 0.5, 0.4, 0.25)]:
        ranks = adapter.ranks(budget * adapter.full_elements)
        sections.append(
            Section(
                f"Ranks at {budget:.0%}",
                f"Coordinates kept of {adapter.shape[2]}, per layer and KV head. Where more are kept, dropping them "
                "would cost more KL.",
                figure=rank_maps(adapter, ranks, f"Ranks at {budget:.0%} of the full cache"),
            )
        )
    intro = (
        "One set of nested bases serves every budget: the cache keeps the first coordinates of keys and values, and "
        "how many is chosen per layer and head when a cache is made. "
        + ("Its bases were trained by distillation." if "training" in adapter.info else "Nothing was trained.")
    )
    write_html(path, title, intro, sections, run_meta())


def write_training_report(path: Path, adapter: KVAdapter, *, title: str) -> None:
    """One HTML page: the KL at fixed shares of the ranks over tokens, and what was trained how."""
    training = dict(adapter.info["training"])
    points = [p for p in training.pop("curve") if any(name.startswith("kl") for name in p)]
    rows = [
        {"tokens": p["tokens"], "kl": p[name], "share": f"{float(name[3:]):.4g}"}
        for p in points
        for name in p
        if name.startswith("kl_")
    ]
    figure = curve(
        rows, "tokens", "kl", "share", title="Held-out text while training", xlabel="tokens trained on",
        ylabel="KL to the full model (nats per token)", log_y=True,
    )  # fmt: skip
    note = (
        "Each line is a share of the ranks, exact tokens not counted. Keys and values are cut by masks here, and "
        "every token reads its history as a decode would."
    )
    options = [{"setting": name, "value": str(value)} for name, value in training.items()]
    sections = [Section("KL over tokens", note, rows=points, figure=figure)]
    sections.append(Section("Options", "What this adapter was trained with.", rows=options))
    write_html(path, title, "Rotations of nested bases, trained to follow the full model.", sections,
                      run_meta())  # fmt: skip


def run(model: str, out: Path, tokens: int, console: Console) -> list[dict]:
    """The demo: measure budgets on held-out text, answer a prompt at several sizes, write the report.

    The adapter is the one that comes with the package, if it has one for the model; with ``tokens``, one that is
    calibrated on as many.
    """
    with console.status(f"loading {model}"):
        language_model, tokenizer = load_model(model)
    texts = list(read_texts(None))
    held_out = texts[::8]
    if not tokens and model in built_in():
        adapter = KVAdapter.from_pretrained(model)
        console.print(f"The adapter of the package, trained on {adapter.info['training']['tokens']:,} tokens.")
    else:
        start = time.perf_counter()
        rest = [t for i, t in enumerate(texts) if i % 8]
        adapter = fit(language_model, tokenizer, rest, FitConfig(tokens=tokens or TOKENS))
        console.print(f"Calibrated on {adapter.info['tokens']:,} tokens in {time.perf_counter() - start:.0f} s.")
    measured = partial(EvalConfig, windows=1, dtype="bfloat16")
    rows: list[dict] = []
    for config in (measured(budgets=BUDGETS), measured(budgets=BITS, bits=True)):
        rows += evaluate(language_model, tokenizer, held_out, adapter, config)[bool(rows) :]
    console.print(table(rows, COLUMNS, title=f"{model}: what a smaller cache costs"))
    console.print()
    console.print(f"Prompt, with a story before it: {PROMPT.splitlines()[-1]}")
    make = partial(adapter.cache, language_model, dtype=torch.bfloat16)
    answers = {}

    def answer(title: str, cache: NestedCache, streamer: _Keeping) -> None:
        console.rule(title)
        note = stream(language_model, tokenizer, PROMPT, cache, max_new_tokens=60, streamer=streamer)
        console.print(note, style="dim")
        answers[title] = ("".join(streamer.kept), note)

    for budget in ANSWERS:
        answer(f"{budget:.0%} of the full cache", make(budget), _Keeping(tokenizer))
    cache = make(SHRINK[0], bits=True)
    title = f"{SHRINK[0]:.0%}, and {SHRINK[1]:.1%} from the {SHRINK_AT}th token on, ranks and bits"
    answer(title, cache, _Shrinking(tokenizer, cache, SHRINK[1]))
    write_report(out, adapter, rows, BUDGETS, title=f"nestling: {model} with a smaller KV cache", answers=answers)
    console.print()
    console.print(f"Report: {out}")
    return rows


class _Plain(TextStreamer):
    """Streams the answer to the terminal; control characters in it are spelled out."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible_lines(text), stream_end)


class _Keeping(_Plain):
    """Streams to the terminal and keeps the text."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.kept: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.kept.append(text)
        super().on_finalized_text(text, stream_end)


class _Shrinking(_Keeping):
    """Lowers the budget of the cache that is being written, once."""

    def __init__(self, tokenizer, cache: NestedCache, budget: float):
        super().__init__(tokenizer)
        self.cache, self.budget, self.left = cache, budget, SHRINK_AT

    def put(self, value) -> None:
        super().put(value)
        self.left -= 1
        if not self.left:
            before = self.cache.nbytes
            self.cache.shrink(self.budget)
            self.on_finalized_text(f" [{before / 2**20:.2f} -> {self.cache.nbytes / 2**20:.2f} MiB] ")
