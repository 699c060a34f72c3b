"""Puts the committed results into the README and docs/results.md, between `<!-- NAME -->` and `<!-- /NAME -->`.

python benchmarks/tables.py [--check]
"""

import json
import re
from pathlib import Path

import typer

from nestling.report.tables import markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
KINDS = {"mean_sts": "STS (Spearman)", "mean_ndcg": "retrieval (nDCG@10)", "mean_recall": "retrieval (recall@100)"}


def load(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]


def by_budget(rows: list[dict], column: str) -> str:
    """One column of the results at each budget, by method."""
    nested = [r for r in rows if r["budget"] is not None and r.get(column) is not None]
    methods = list(dict.fromkeys(r["method"] for r in nested))
    found: dict[float, dict] = {}
    for row in nested:
        found.setdefault(row["budget"], {})[row["method"]] = row[column]
    cells = [{"budget": f"{b:.1%}".replace(".0%", "%"), **found[b]} for b in sorted(found, reverse=True)]
    return markdown_table(cells, {"budget": "budget", **{m: m for m in methods}})


def kv_paper() -> str:
    """KL at each budget of untrained and trained bases."""
    return by_budget(load("kv_paper"), "kl")


def kv_tasks() -> str:
    """Accuracy on each task, their mean as the paper has it, and what is kept above chance."""
    rows = [r for r in load("kv_paper") if r.get("above_chance") is not None]
    tasks = [name for name in rows[0] if name.startswith("acc_")]
    for row in rows:
        row["mean"] = sum(row[name] for name in tasks) / len(tasks)
    columns = {"method": "method", "budget": "budget", **{name: name[4:] for name in tasks}}
    return markdown_table(rows, {**columns, "mean": "mean", "above_chance": "kept above chance"})


def kv_ablate() -> str:
    """KL at shares of the ranks after short trainings."""
    rows = load("kv_ablate")
    shares = [name for name in rows[0] if name.startswith("kl_")]
    return markdown_table(rows, {"arm": "training", **{name: f"{float(name[3:]):.1%}" for name in shares}})


def kv_evict() -> str:
    columns = {"method": "kept", "bytes_share": "share of bf16", "kl": "KL", "ppl": "perplexity", "top1": "top-1"}
    return markdown_table(load("kv_evict"), columns)


OURS = ("bits", "bits-balanced", "bits-pca", "ranks")
MAIN = ("full", *OURS, "int8", "int4", "kivi-int4", "kivi-int3", "kivi-int2", "hqq-int4")


def kv_bits(methods: tuple[str, ...] = MAIN) -> str:
    """A table a model: what a cache of each size costs, and the questions that it still answers."""
    columns = {
        "method": "cache", "bytes_share": "share of bf16", "kl": "KL", "ppl": "perplexity", "top1": "top-1",
        "above_chance": "kept above chance", **{f"passkey_{n}": f"passkeys in {n:,}" for n in (500, 1000, 8000)},
    }  # fmt: skip
    rows, parts = [row for row in load("kv_bits") if not methods or row["method"] in methods], []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        there = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in own)}
        parts.append(f"{model}:\n\n{markdown_table(own, there)}")
    return "\n".join(parts)


def kv_bits_all() -> str:
    return kv_bits(())


def kv_sft() -> str:
    columns = {"method": "trained", "budget": "budget", "answer_ppl": "perplexity", "acc_gsm8k": "exact match"}
    return markdown_table(load("kv_sft"), columns)


def kv_step() -> str:
    columns = {"shape": "texts x tokens", "method": "step", "tokens_per_s": "tokens/s", "over_least": "over the least"}
    return markdown_table(load("kv_step"), columns)


def kv_quality() -> str:
    """KL at each budget, a column per method, and the quantised caches in a table of their own."""
    rows = load("kv_quality")
    others = [r for r in rows if r["budget"] is None]
    columns = {"method": "cache", "bytes_share": "share of bf16", "kl": "KL", "ppl": "perplexity", "top1": "top-1"}
    return by_budget(rows, "kl") + "\n" + markdown_table(others, columns)


def kv_speed() -> str:
    """Speed by context and cache; compression alone is over our own attention at (all but) full rank."""
    columns = {
        "context": "tokens", "method": "cache", "cache_mib": "MiB", "attention_ms": "attention ms",
        "attention_gb_s": "GB/s", "attention_same_storage_over_this": "attention speed-up",
        "alone": "compression alone", "decode_ms": "step ms", "decode_same_storage_over_this": "step speed-up",
        "decode_dynamic_over_this": "step over DynamicCache",
    }  # fmt: skip
    rows = [r for r in load("kv_speed") if not r["method"].endswith("again")]
    ours = {r["context"]: r["attention_ms"] for r in rows if r["method"] == "same-attention"}
    for row in rows:
        row["alone"] = ours[row["context"]] / row["attention_ms"] if row["method"].startswith("nested") else None
    return markdown_table(rows, columns)


def embed_quality(kinds: tuple[str, ...] = tuple(KINDS)) -> str:
    """A table a model and measure: quality of every cup by method, x 100; minutes and peak memory of the training.

    The largest of separately trained models is the one that was trained at full size.
    """
    rows, parts = load("embed_quality"), []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        parts += [f"{model}, {KINDS[kind]}:\n\n{_by_cup(own, kind)}" for kind in kinds]
    return "\n".join(parts)


def embed_sts() -> str:
    return embed_quality(("mean_sts",))


def _by_cup(rows: list[dict], kind: str) -> str:
    cups = sorted({row["cup"] for row in rows}, key=_depth)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if method == "separate":
            own += [row for row in rows if row["method"] == "full-then-cut" and row["cup"] == cups[-1]]
        line = {"method": method, **{row["cup"]: 100 * row[kind] for row in own}}
        if len(own) == len(cups):
            line["mean"] = sum(line[cup] for cup in cups) / len(cups)
        peaks = [row["peak_mib"] for row in own if row["peak_mib"] is not None]
        # Cups of one training tell its minutes each; models of their own are added up.
        line["minutes"] = sum(dict.fromkeys(row["minutes"] for row in own)) or None
        lines.append(line | {"GiB": max(peaks) / 1024 if peaks else None})
    return markdown_table(lines, {name: name for name in ("method", *cups, "mean", "minutes", "GiB")})


def embed_step() -> str:
    columns = {"model": "model", "method": "step", "texts_per_s": "texts/s", "over_full": "over fine-tuning"}
    return markdown_table(load("embed_step"), columns)


def embed_speed() -> str:
    """A row a cup: texts/s at each shape of a batch, and the share of the k-layer ideal at the largest."""
    rows, lines = load("embed_speed"), {}
    shapes = {f"{row['batch']}x{row['tokens']}": f"{row['batch']} x {row['tokens']}" for row in rows}
    for row in rows:
        line = lines.setdefault((row["encoder"], row["model"]), dict(row))
        line[f"{row['batch']}x{row['tokens']}"] = row["texts_per_s"]
        line |= {key: row[key] for key in ("over_full", "of_ideal")}
    columns = {
        "encoder": "encoder", "model": "cup", **shapes, "over_full": "over full", "of_ideal": "of ideal", "mib": "MiB",
        "bytes_per_vector": "bytes a vector", "search_ms": "search ms",
    }  # fmt: skip
    return markdown_table(list(lines.values()), columns)


def smae() -> str:
    """A table a start and measure: quality of every cup, x 100, by arm and tokens of its pre-training, and minutes."""
    rows, parts = load("smae"), []
    for row in rows:
        row["arm"] = (row["model"], row["method"], row["seed"], row["pretrain_steps"])
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for kind, title in KINDS.items():
            lines = [_arm(own, arm, kind) for arm in dict.fromkeys(row["arm"] for row in own)]
            names = ("arm", "seed", "tokens", *sorted({row["cup"] for row in own}, key=_depth), "mean")
            columns = {name: name for name in (*names, "pre-training", "fine-tuning")}
            parts.append(f"{model}, {title}:\n\n{markdown_table(lines, columns)}")
    return "\n".join(parts)


def _arm(rows: list[dict], arm: tuple, kind: str) -> dict:
    own = [row for row in rows if row["arm"] == arm]
    line = {"arm": arm[1], "seed": arm[2]}
    line |= {"tokens": own[0].get("pretrain_tokens"), "pre-training": own[0].get("pretrain_minutes")}
    line |= {row["cup"]: 100 * row[kind] for row in own}
    line["mean"] = sum(100 * row[kind] for row in own) / len(own)
    return line | {"fine-tuning": sum(dict.fromkeys(row["minutes"] for row in own))}


def _depth(cup: str) -> int:
    return int(cup.split("x")[0])


def smae_speed() -> str:
    columns = {
        "model": "model", "cups": "cups", "vocabulary": "vocabulary", "method": "step", "tokens_per_s": "tokens/s",
        "speed_over_naive": "over naive", "step_mib": "MiB", "memory_over_naive": "of naive's",
    }  # fmt: skip
    return markdown_table(load("smae_speed"), columns)


def main(check: bool = typer.Option(False, help="Only say whether the pages are up to date.")):
    made = (kv_quality, kv_paper, kv_tasks, kv_ablate, kv_evict, kv_bits, kv_bits_all, kv_sft, kv_step, kv_speed)
    made += (embed_sts, embed_quality, embed_step, embed_speed, smae, smae_speed)
    tables = {f.__name__: f for f in made}
    for page in PAGES:
        text = old = page.read_text("utf-8")
        for name in re.findall(r"<!-- (\w+) -->", text):
            table = tables[name]()
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = pattern.sub(lambda m, body=table: f"{m[1]}\n{body}\n{m[2]}", text)
        if check and text != old:
            raise SystemExit(f"{page.name} is out of date: run python benchmarks/tables.py")
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    typer.run(main)
