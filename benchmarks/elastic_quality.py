"""Quality of MiniLM's small sizes before and after distillation: STS, retrieval, and search across sizes.

    python benchmarks/elastic_quality.py --data FOLDER --texts texts.txt --adapter FOLDER --ways aligned,trained,across

``aligned`` is the closed form on texts without labels, ``trained`` the adapter; both are measured by `GridEvaluator`.
``across`` searches documents of small sizes by queries of the full one, in the space of the adapter; ``fitted`` does
so after `align` on the documents of the set that no query asks for. Ways that are in
the results file already are not measured again.
"""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from embed_data import RETRIEVAL, held_out_sets
from rich.console import Console

from nestling import ElasticEncoder
from nestling.data.retrieval import read_retrieval
from nestling.data.texts import read_texts
from nestling.embed import ElasticAdapter, GridEvaluator
from nestling.embed.evaluation.metrics import ranking
from nestling.report.results import run_meta, write_json
from nestling.report.tables import table

SIZES = "1x128,1x384,2x192,2x384,3x256,3x384,4x384"
ACROSS = ("1x384", "2x384", "3x384")
ALIGNED = 5000  # texts
CARD = ("size", "mean_sts", "share_sts", "mean_ndcg", "share_ndcg")
KEPT = ("commit", "date", "seconds", "command")


def across(plain: ElasticEncoder, data: Path, names: Sequence[str], fitted: bool) -> list[dict[str, Any]]:
    """nDCG@10 of queries of the full size on documents of small ones, of some sets."""
    rows: dict[str, dict[str, Any]] = {size: {"size": size} for size in ACROSS}
    for name in names:
        found, encoder = read_retrieval(str(held_out_sets(data)["retrieval"][name])), plain
        if fitted:
            judged = {key for gains in found.relevant.values() for key in gains}
            encoder = ElasticEncoder(plain.model, plain.sizes, adapter=plain.adapter)
            encoder.align([text for key, text in found.corpus.items() if key not in judged and text.strip()])
        places = {key: place for place, key in enumerate(sorted(found.corpus))}
        relevant = [{places[key]: gain for key, gain in found.relevant[query].items() if key in places}
                    for query in found.queries]  # fmt: skip
        queries = encoder.encode_query(list(found.queries.values()), convert_to_tensor=True)
        texts = [found.corpus[key] for key in places]
        documents = encoder.encode(texts, sizes=ACROSS, convert_to_tensor=True)
        for size, row in rows.items():
            row[f"ndcg_{name}"] = ranking(queries, documents[size], relevant)[0]
    for row in rows.values():
        values = [value for key, value in row.items() if key.startswith("ndcg_")]
        row["mean_ndcg"] = sum(values) / len(values)
    return list(rows.values())


def write_card(folder: Path, model: str, rows: list[dict[str, Any]]) -> None:
    """Write what was measured into the card of an adapter."""
    adapter = ElasticAdapter.from_pretrained(folder)
    shown = [row for row in rows if row["method"] == "trained"] + [row for row in rows if row["size"] == "6x384"]
    adapter.info["measured"] = [{key: row[key] for key in CARD} for row in shown]
    adapter.described(ElasticEncoder.from_pretrained(model, adapter=None).model).save_pretrained(folder)


def main(
    data: Path = typer.Option(..., help="The folder of the data sets."),
    model: str = typer.Option("minilm", help="Folder, hub id or alias."),
    adapter: str = typer.Option("auto", help="Of the trained sizes."),
    texts: Path | None = typer.Option(None, help="Texts that are aligned on."),
    ways: str = typer.Option("aligned,trained,across,fitted"),
    length: int = typer.Option(128, help="Tokens of a text that is measured."),
    bf16: bool = typer.Option(False, help="Measure under autocast."),
    card: Path | None = typer.Option(None, help="Folder of an adapter whose card gets the table."),
    out: Path = typer.Option(Path("benchmarks/results/elastic.json"), help="Joined with what is there."),
):
    old = json.loads(out.read_text("utf-8")) if out.exists() else {"rows": [], "meta": {"runs": []}}
    rows, runs = old["rows"], old["meta"]["runs"]
    evaluator = GridEvaluator(**held_out_sets(data), progress=True)
    for way in ways.split(","):
        if any(row["method"] == way for row in rows):
            continue
        start = time.monotonic()
        aligned = way == "aligned"
        sizes = f"{SIZES},6x384" if aligned else SIZES  # the full one is the same in both
        encoder = ElasticEncoder.from_pretrained(model, sizes, adapter=None if aligned else adapter)
        encoder.model.max_seq_length = length
        if not aligned:
            encoder = ElasticEncoder(encoder.model, sizes, adapter=encoder.adapter)
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            if aligned:
                encoder.align(list(islice(read_texts(texts, layout="lines"), ALIGNED)))
            if way in ("across", "fitted"):
                found = across(encoder, data, RETRIEVAL, way == "fitted")
            else:
                partial = out.with_suffix(f".{way}.partial")
                found = encoder.evaluate(evaluator=evaluator, method=way, partial=partial)
        rows += [{"model": Path(model).name, "method": way, **{k: v for k, v in row.items() if k not in
                                                              ("model", "method")}} for row in found]  # fmt: skip
        meta = run_meta(time.monotonic() - start)
        runs.append({"method": way, "length": length, "bf16": bf16, **{key: meta[key] for key in KEPT}})
        whole = next((row for row in rows if row["size"] == "6x384"), {})
        for row in rows:
            for mean in ("mean_sts", "mean_ndcg"):
                if mean in row and mean in whole:
                    row[f"share_{mean[5:]}"] = row[mean] / whole[mean]
        write_json(out, rows, {**meta, "runs": runs})
        out.with_suffix(f".{way}.partial").unlink(missing_ok=True)
    if card is not None:
        write_card(card, model, rows)
    columns = ("method", "size", "mean_sts", "share_sts", "mean_ndcg", "share_ndcg")
    Console().print(table([{key: row.get(key) for key in columns} for row in rows]))


if __name__ == "__main__":
    typer.run(main)
