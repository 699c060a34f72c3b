"""Writes the committed results into the README and docs/results, between `<!-- NAME -->` and `<!-- /NAME -->`.

python benchmarks/tables.py [--check]
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cost_tables
import elastic_tables
import llamacpp_tables
import typer
from columns import (
    ROOT,
    Format,
    budget_percent,
    digits,
    load,
    millions,
    of_four,
    percent,
    pivot,
    table,
    times_100,
    titled,
    unique,
    whole_percent,
)
from names import CACHES, ENCODERS, MEASURES, MODELS, PRETRAININGS, TRAININGS

PAGES = (ROOT / "README.md", ROOT / "docs" / "serving.md", *sorted((ROOT / "docs" / "results").glob("*.md")))

CACHE = {"method": ("cache", CACHES.__getitem__)}
SHARE = {"bytes_share": ("share of bf16", percent)}
LOSS = {"kl": ("KL", digits), "ppl": ("perplexity", digits), "top1": ("top-1 agreement", percent)}
BUDGET = ("budget", budget_percent)


def kv_by_budget(name: str) -> str:
    rows = [row for row in load(name) if row["budget"] is not None and row.get("kl") is not None]
    rows.sort(key=lambda row: -row["budget"])
    return pivot(rows, ("budget", *BUDGET), ("method", CACHES.__getitem__), "kl", digits)


def kv_quantised() -> str:
    return table([row for row in load("kv_quality") if row["budget"] is None], {**CACHE, **SHARE, **LOSS})


def kv_bits(model: str) -> str:
    """All but what kv_cost.json has of SmolLM2."""
    rows = [row for row in load("kv_bits") if row["model"] == model]
    rows = [row for row in rows if model != "smollm2" or row["method"] not in ("bits", "bits-window-64")]
    return table(rows, {**CACHE, **SHARE, **LOSS})


def kv_answers() -> str:
    """The six tasks and the passkeys of SmolLM2, for the caches that answered them."""
    rows = [row for row in load("kv_bits") if row.get("above_chance") is not None]
    passkeys = {f"passkey_{n}": (f"passkeys found in {n:,} tokens", of_four) for n in (500, 1000)}
    return table(rows, {**CACHE, **SHARE, "above_chance": ("accuracy kept above chance", whole_percent), **passkeys})


def kv_passkeys() -> str:
    rows = [row for row in load("kv_bits") if row.get("passkey_8000") is not None]
    return table(rows, {**CACHE, **SHARE, "passkey_8000": ("passkeys found in 8,000 tokens", of_four)})


def kv_tasks() -> str:
    """Accuracy on each task, their mean as the paper has it, and the part above chance that is kept."""
    rows = [row for row in load("kv_paper") if row.get("above_chance") is not None]
    tasks = [key for key in rows[0] if key.startswith("acc_")]
    for row in rows:
        row |= {"budget": row["budget"] or 1.0, "mean": sum(row[task] for task in tasks) / len(tasks)}
    columns = {task: (task[4:].replace("_", " "), whole_percent) for task in tasks} | {"mean": ("mean", percent)}
    return table(
        rows, {**CACHE, "budget": BUDGET, **columns, "above_chance": ("accuracy kept above chance", whole_percent)}
    )


def kv_ablate() -> str:
    rows = load("kv_ablate")
    shares = {key: (budget_percent(float(key[3:])), digits) for key in rows[0] if key.startswith("kl_")}
    return table(rows, {"arm": ("training", TRAININGS.__getitem__), **shares})


def kv_step() -> str:
    rows = load("kv_step")
    columns = {"tokens_per_s": ("tokens/s", digits), "over_least": ("time over the least", digits)}
    shapes = {shape: [row for row in rows if row["shape"] == shape] for shape in unique(rows, "shape")}
    return titled({
        "{} x {} tokens a step".format(*shape.split("x")):
        table(own, {"method": ("training step", TRAININGS.__getitem__), **columns})
        for shape, own in shapes.items()
    })  # fmt: skip


def serve_load() -> str:
    seconds, resident = ("seconds for an answer", digits), ("resident memory, MiB", lambda size: f"{size:,.0f}")
    return table(load("serve_load"), {"requests": ("requests", str), "seconds": seconds, "resident_mib": resident})


def kv_sft() -> str:
    columns = {"budget": BUDGET, "answer_ppl": ("perplexity", digits), "acc_gsm8k": ("exact match", whole_percent)}
    return table(load("kv_sft"), {"method": ("trained", TRAININGS.__getitem__), **columns})


def kv_evict() -> str:
    return table(load("kv_evict"), {"method": ("kept", CACHES.__getitem__), **SHARE, **LOSS})


def kv_speed(value: str, nested_only: bool = False) -> str:
    """One measure by cache and context; `alone` is the attention's gain from compression alone."""
    rows = [row for row in load("kv_speed") if not row["method"].endswith("again")]
    ours = {row["context"]: row["attention_ms"] for row in rows if row["method"] == "same-attention"}
    for row in rows:
        row["alone"] = ours[row["context"]] / row["attention_ms"]
    shown = [row for row in rows if not nested_only or row["method"].startswith("nested")]
    down = ("method", "cache", CACHES.__getitem__)
    return pivot(shown, down, ("context", lambda n: f"{n:,} tokens"), value, digits)


def kv_shrink() -> str:
    lines: dict[tuple, dict] = {}
    for row in load("kv_shrink"):
        if row["method"].endswith("-shrink"):
            line = lines.setdefault((row["method"], row["budget"], row["to"]), dict(row))
            line |= {f"{key} {row['context']}": row[key] for key in ("stall_ms", "stall_in_steps")}
    stalls = {
        f"{key} {n}": (f"{title}, {n:,} tokens", digits)
        for n in (2048, 8192)
        for key, title in (("stall_ms", "stall in ms"), ("stall_in_steps", "stall in steps"))
    }
    return table(lines.values(), {**CACHE, "budget": ("from", budget_percent), "to": ("to", budget_percent), **stalls})


def encoder_rows(model: str) -> list[dict]:
    """Quality by method and size. The largest of the separate models is the one that was fine-tuned at full size."""
    rows = [row for row in load("embed_quality") if row["model"] == model]
    largest = max((row["size"] for row in rows), key=layers)
    full = [row for row in rows if row["method"] == "full-then-cut" and row["size"] == largest]
    return rows + [row | {"method": "separate"} for row in full]


def layers(size: str) -> int:
    return int(size.split("x")[0])


def by_size(lines: Mapping[Any, list[dict]], first: Mapping[str, tuple[str, Format]], kind: str) -> str:
    """A row for each training, a column for each size, and their mean."""
    sizes = sorted({row["size"] for own in lines.values() for row in own}, key=layers)
    rows = [
        {**own[0], **{row["size"]: row[kind] for row in own}, "mean": sum(row[kind] for row in own) / len(own)}
        for own in lines.values()
    ]
    return table(rows, {**first, **{size: (size, times_100) for size in (*sizes, "mean")}})


def embed_quality() -> str:
    parts = {}
    for model in ("e5-small", "mpnet"):
        rows = [row for row in encoder_rows(model) if row["method"] != "student"]
        lines = {method: [row for row in rows if row["method"] == method] for method in unique(rows, "method")}
        for kind, measure in MEASURES.items():
            parts[f"{MODELS[model]}, {measure}"] = by_size(lines, {"method": ("method", ENCODERS.__getitem__)}, kind)
    return titled(parts)


def embed_short() -> str:
    """Six rows for the README: STS of each size by method, and its speed."""
    speed = {row["model"]: row["over_full"] for row in load("embed_speed") if row["encoder"] == "mpnet"}
    lines = {size: {"size": size, "speed": speed[size]} for size in speed if size != "minilm"}
    for row in encoder_rows("mpnet"):
        lines[row["size"]][row["method"]] = row["mean_sts"]
    methods = {method: (ENCODERS[method], times_100) for method in ("cut", "cut-aligned", "srl", "separate")}
    return table(lines.values(), {"size": ("size", str), **methods, "speed": ("speed over full size", digits)})


def embed_student() -> str:
    rows = [row for row in encoder_rows("mpnet") if row["size"] == "6x128"]
    return table(rows, {"method": ("6x128", ENCODERS.__getitem__), **{k: (t, times_100) for k, t in MEASURES.items()}})


def embed_minilm() -> str:
    rows = [row for row in encoder_rows("mpnet") if row["method"] == "srl"] + load("embed_quality")[-1:]
    for row in rows:
        row["encoder"] = f"{MODELS[row['model']]}, {row['size']}"
    return table(rows, {"encoder": ("encoder", str), **{k: (t, times_100) for k, t in MEASURES.items()}})


def embed_minutes() -> str:
    """Minutes and peak memory of each training; those of separate models are added up."""
    parts = {}
    for model in ("e5-small", "mpnet"):
        rows = [row for row in encoder_rows(model) if row["peak_mib"] is not None and row["method"] != "student"]
        lines = []
        for method in unique(rows, "method"):
            own = [row for row in rows if row["method"] == method]
            minutes = sum(dict.fromkeys(row["minutes"] for row in own))
            lines.append({"method": method, "minutes": minutes, "gib": max(row["peak_mib"] for row in own) / 1024})
        columns = {"minutes": ("minutes", digits), "gib": ("peak memory, GiB", digits)}
        parts[MODELS[model]] = table(lines, {"method": ("training", ENCODERS.__getitem__), **columns})
    return titled(parts)


def embed_step() -> str:
    columns = {"texts_per_s": ("texts/s", digits), "over_full": ("time over full size", digits)}
    return table(load("embed_step"), {"method": ("training step", ENCODERS.__getitem__), **columns})


def embed_speed() -> str:
    """A row for each size: texts/s at each shape of a batch; the gain over the full model is that of the largest."""
    rows, parts = load("embed_speed"), {}
    shapes = {f"{row['batch']} x {row['tokens']}": None for row in rows}
    columns = {
        "model": ("size", lambda size: MODELS.get(size, size)), **{shape: (shape, digits) for shape in shapes},
        "over_full": ("speed over full size", digits), "mib": ("MiB", digits),
        "bytes_per_vector": ("bytes a vector", digits), "search_ms": ("search ms", digits),
    }  # fmt: skip
    for encoder in unique(rows, "encoder"):
        lines: dict[str, dict] = {}
        for row in rows:
            if row["encoder"] == encoder:
                line = lines.setdefault(row["model"], dict(row))
                line |= {f"{row['batch']} x {row['tokens']}": row["texts_per_s"], "over_full": row["over_full"]}
        parts[MODELS[encoder]] = table(lines.values(), columns)
    return titled(parts)


def embed_ideal() -> str:
    """The share of layers / depth, the most that a cut model can gain, in batches of 32 texts of 128 tokens."""
    rows = [row for row in load("embed_speed") if row["batch"] == 32 and row["tokens"] == 128]
    rows = [row | {"layers": layers(row["model"])} for row in rows if row["model"] != "minilm"]
    down = ("encoder", "encoder", MODELS.__getitem__)
    return pivot(rows, down, ("layers", lambda n: f"{n} layers"), "of_ideal", percent)


def elastic() -> str:
    """A row a size, before and after distillation; the share is of the full size."""
    lines: dict[str, dict] = {}
    for row in load("elastic"):
        if row["method"] in ("aligned", "trained"):
            line = lines.setdefault(row["size"], {"size": row["size"]})
            line |= {
                f"{key} {row['method']}": row[f"{key}"] for key in ("mean_sts", "share_sts", "mean_ndcg", "share_ndcg")
            }
    full = lines["6x384"]
    full |= {key.replace("aligned", "trained"): value for key, value in full.items()}  # it stays as it is
    columns: dict[str, tuple[str, Format]] = {"size": ("size", str)}
    for kind, title in (("sts", "STS"), ("ndcg", "nDCG@10")):
        for method in ("aligned", "trained"):
            columns[f"mean_{kind} {method}"] = (f"{title}, {method}", times_100)
        columns[f"share_{kind} trained"] = ("of full", percent)
    return table(lines.values(), columns)


def elastic_across(method: str = "across") -> str:
    """Full queries on documents of small sizes, by the packaged maps or by maps fitted to documents of each set."""
    rows = load("elastic")
    full = next(row["mean_ndcg"] for row in rows if row["size"] == "6x384")
    own = {row["size"]: row["mean_ndcg"] for row in rows if row["method"] == "trained"}
    shown = [
        row | {"own": own[row["size"]], "share": row["mean_ndcg"] / full} for row in rows if row["method"] == method
    ]
    columns: dict[str, tuple[str, Format]] = {"size": ("documents", str)}
    columns |= {f"ndcg_{name}": (name, times_100) for name in ("scifact", "cranfield", "cisi")}
    columns |= {"mean_ndcg": ("mean", times_100), "share": ("of full", percent)}
    return table(shown, columns | ({"own": ("queries of the same size", times_100)} if method == "across" else {}))


def smae(start: str) -> str:
    """Quality of every size by pre-training; minutes of both phases."""
    rows = [row for row in load("smae") if row["model"] == start]
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["pretrain_steps"]), []).append(row)
    first = {"method": ("pre-training", PRETRAININGS.__getitem__), "tokens": ("million tokens", millions)}
    for own in lines.values():
        own[0] |= {"tokens": own[0].get("pretrain_tokens", 0), "before": own[0].get("pretrain_minutes", 0)}
        own[0]["after"] = sum(dict.fromkeys(row["minutes"] for row in own))
    minutes = {"before": ("minutes of pre-training", digits), "after": ("minutes of fine-tuning", digits)}
    parts = {title: by_size(lines, first, kind) for kind, title in MEASURES.items()}
    return titled({**parts, "Cost": table([own[0] for own in lines.values()], {**first, **minutes})})


def smae_speed() -> str:
    columns = {
        "tokens_per_s": ("tokens/s", digits), "speed_over_naive": ("speed-up", digits), "step_mib": ("MiB", digits),
        "memory_over_naive": ("share of the memory", percent),
    }  # fmt: skip
    return table(load("smae_speed"), {"method": ("training step", PRETRAININGS.__getitem__), **columns})


def embed_search() -> str:
    """A row for each engine, by a prefix and then by full vectors."""
    rows = sorted(load("embed_search"), key=lambda row: row["candidates"] is None)
    for row in rows:
        row["stages"] = "full vectors"
        if row["candidates"] is not None:
            row["stages"] = f"{row['width']} of {row['dims']} find {row['candidates']}"
    columns = {
        "engine": ("engine", str), "stages": ("coordinates", str), "recall": ("recall@10", percent),
        "ms": ("ms a query", digits), "over_flat": ("speed over FAISS flat", digits), "build_s": ("build s", digits),
    }  # fmt: skip
    return table(rows, columns)


TABLES: dict[str, Callable[[], str]] = {
    "kv_short": cost_tables.short, "kv_cost": partial(cost_tables.budgets, "smollm2"),
    "kv_cost_lengths": cost_tables.lengths, "kv_levels": cost_tables.levels,
    "kv_cost_fit": cost_tables.fitted,
    "kv_cost_course": cost_tables.course, "kv_cost_rivals": partial(cost_tables.rivals, "smollm2"),
    "kv_cost_gemma": partial(cost_tables.budgets, "gemma3"),
    "kv_cost_gemma_rivals": partial(cost_tables.rivals, "gemma3"),
    "kv_quality": partial(kv_by_budget, "kv_quality"), "kv_quantised": kv_quantised,
    "kv_bits_variants": partial(kv_bits, "smollm2"),
    "kv_bits_gemma": partial(kv_bits, "gemma3"), "kv_answers": kv_answers, "kv_passkeys": kv_passkeys,
    "elastic": elastic, "embed_search": embed_search,
    "elastic_across": elastic_across, "elastic_fitted": partial(elastic_across, "fitted"),
    "elastic_curve": elastic_tables.curve, "elastic_alone": elastic_tables.alone,
    "elastic_joined": partial(elastic_tables.joined, "packaged"), "elastic_tried": elastic_tables.tried,
    "elastic_joined_fitted": partial(elastic_tables.joined, "fitted"), "elastic_exit": elastic_tables.early_exit,
    "kv_paper": partial(kv_by_budget, "kv_paper"), "kv_tasks": kv_tasks, "kv_ablate": kv_ablate, "kv_step": kv_step,
    "kv_sft": kv_sft, "serve_load": serve_load, "kv_evict": kv_evict, "kv_shrink": kv_shrink,
    "kv_llamacpp": llamacpp_tables.beside,
    "kv_speed_step": partial(kv_speed, "decode_ms"),
    "kv_speed_step_gain": partial(kv_speed, "decode_dynamic_over_this"),
    "kv_speed_attention": partial(kv_speed, "attention_ms"),
    "kv_speed_attention_gain": partial(kv_speed, "attention_same_storage_over_this"),
    "kv_speed_alone": partial(kv_speed, "alone", True),
    "kv_speed_size": partial(kv_speed, "cache_mib"), "kv_speed_bandwidth": partial(kv_speed, "attention_gb_s"),
    "embed_short": embed_short, "embed_quality": embed_quality,
    "embed_student": embed_student, "embed_minilm": embed_minilm, "embed_minutes": embed_minutes,
    "embed_step": embed_step, "embed_speed": embed_speed, "embed_ideal": embed_ideal,
    "smae_500": partial(smae, "random-modernbert-6x256"), "smae_150": partial(smae, "random-modernbert-6x256-150"),
    "smae_e5": partial(smae, "e5-small"), "smae_speed": smae_speed,
}  # fmt: skip


def main(check: bool = typer.Option(False, help="Only say whether the pages are up to date.")):
    for page in PAGES:
        text = old = page.read_text("utf-8")
        for name in re.findall(r"<!-- (\w+) -->", text):
            block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            body = TABLES[name]()
            text = block.sub(lambda match, body=body: f"{match[1]}\n{body}\n{match[2]}", text)
        if check and text != old:
            raise SystemExit(f"{page.name} is out of date: run python benchmarks/tables.py")
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    typer.run(main)
