"""`encode_corpus`: the vectors of a corpus at several sizes, in a folder, by shards."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nestling.data.layout import Layout
from nestling.data.records import Record, read_records
from nestling.data.rows import Columns
from nestling.embed.corpus.config import EncodeConfig
from nestling.embed.corpus.engines import Job, in_processes, in_this_process
from nestling.embed.corpus.graphs import write_graphs
from nestling.embed.corpus.shards import Shard, Work, known_shard, pyarrow_parquet, stem
from nestling.embed.corpus.vectors import MANIFEST, Vectors, read_manifest, write_manifest
from nestling.embed.elastic import ElasticEncoder
from nestling.embed.export.tracing import check_installed
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.fingerprint import checksum, fingerprint, reading
from nestling.embed.model.similarity import Similarity
from nestling.errors import EncodeError, FileError, OptionError
from nestling.files.temporary import sweep, temporary_folder
from nestling.files.writing import check_folder, naming
from nestling.jobs.progress import progress_bar
from nestling.options import path


def encode_corpus(
    model: Any,
    corpus: Any,
    out: str | os.PathLike[str],
    config: EncodeConfig | None = None,
    *,
    sizes: Any = None,
    adapter: Any = "auto",
    columns: Columns | None = None,
    layout: Layout = "auto",
) -> Vectors:
    """Write the vectors of a corpus, as documents to be found, at several sizes from one pass over it.

    Sizes that are read from the same layers cost one forward. Vectors are of unit length where the model compares by
    cosine. The same call goes on where a killed one stopped: shards that are there, whole, of the same texts and the
    same job, stay.

    Args:
        model: as of `ElasticEncoder.from_pretrained`; an `ElasticEncoder` for the engine ``"local"`` alone, since
            others load it again.
        corpus: as of `nestling.data.records.read_records`, with ids.
        out: a new folder, or that of such a run.
        config: see `EncodeConfig`.
        sizes: such as ``"2x192,6x384"``; by default those that the encoder has.
        adapter: as of `ElasticEncoder.from_pretrained`.
        columns, layout: of the corpus; see there.

    Returns:
        The vectors, to be read.

    Raises:
        DataError: the corpus cannot be read, or two texts have one id. It is read once before the work, to be sure.
        EncodeError: the folder's vectors are of another job, or workers are lost again and again.
        ExportError: a backend of ONNX lacks a package, or cannot do what the model does.
        FileError: the folder holds something else, or cannot be written.
        OptionError, LadderError, LoadError, AdapterError: model, sizes and options do not go together.
    """
    config, folder = EncodeConfig.of(config), path("out", out)
    if config.format == "parquet":
        pyarrow_parquet()
    if config.backend != "torch":
        check_installed()
    own = isinstance(model, ElasticEncoder)
    if own and config.engine != "local":
        raise OptionError("model: other engines load it by its name: give a folder, a hub id or an alias")
    check_folder(folder)
    read: dict[str, Any] = {"columns": columns, "layout": layout}
    if corpus is not None and not isinstance(corpus, str | os.PathLike):  # it may be one that is read once
        corpus = [{"id": record.id, "text": record.text} for record in read_records(corpus, **read)]
        read = {}
    total = sum(1 for _ in read_records(corpus, **read))
    encoder = model if own else ElasticEncoder.from_pretrained(model, sizes, adapter=adapter)
    wanted = encoder.sizes if sizes is None else Ladder.parse(sizes)
    if config.dtype == "int8" and not Similarity.of(encoder.model).unit:
        raise OptionError("dtype=int8: the model's vectors have lengths that count, which int8 loses: take float16")
    about = describe(encoder, wanted, config)
    job_id = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    _claim(folder, about)
    job = Job(
        model, adapter, tuple(cup.name for cup in wanted), folder.resolve(), config.format, config.dtype,
        config.batch_size, job_id, max(1, (os.cpu_count() or 1) // config.worker_count),
    )  # fmt: skip
    done: dict[int, Shard] = {}
    with progress_bar() as bar:
        task = bar.add_task("encoding", total=total)

        def missing() -> Iterator[Work]:
            for work in _works(read_records(corpus, **read), config.shard_rows):
                number = work.number
                known = known_shard(folder, number, job_id)
                if known is not None and known.texts == work.checksum:
                    done[number] = known
                    bar.advance(task, known.rows)
                else:
                    yield work

        works = missing()
        if (first := next(works, None)) is not None:
            with _running(job, encoder, config) as ready:
                for shard in _shards(ready, chain([first], works), encoder, config):
                    done[shard.number] = shard
                    bar.advance(task, shard.rows)
    return _finish(folder, about, done, total)


def describe(encoder: ElasticEncoder, sizes: Ladder, config: EncodeConfig) -> dict[str, Any]:
    """What vectors depend on beside the texts, in JSON's types."""
    own, changes = fingerprint(encoder.model), encoder.adapter
    turns = {str(depth): checksum(turn) for depth, turn in sorted(encoder.projections.items())}
    factors = {} if changes is None else {k: [checksum(side) for side in v] for k, v in changes.changes.items()}
    return {
        "model": own["weights"],
        "sizes": str(sizes),
        "spaces": {cup.name: space_of(encoder, cup.layers) for cup in sizes},
        "adapter": checksum([turns, factors]) if turns or factors else None,
        "reading": checksum(reading(encoder.model)),
        "prompt": stored_prompts(encoder.model)["passage"],
        "format": config.format,
        "dtype": config.dtype,
        "shard_rows": config.shard_rows,
        "batch_size": config.batch_size,
        "backend": config.backend,
    }


def space_of(encoder: ElasticEncoder, layers: int) -> str:
    """The id of the space that the vectors of a depth are in: an adapter's, which all its sizes share, or its own."""
    if encoder.space is not None:
        return encoder.space
    turn = encoder.projections.get(layers)
    own = [fingerprint(encoder.model)["weights"], layers, None if turn is None else checksum(turn)]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]


def _works(records: Iterator[Record], rows: int) -> Iterator[Work]:
    number = 0
    while some := list(islice(records, rows)):
        yield Work(number, tuple(record.id for record in some), tuple(record.text for record in some))
        number += 1


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make a folder ours, or see that it is of the same job."""
    if (folder / MANIFEST).exists():
        theirs = read_manifest(folder).object("job").values
        if differ := [name for name in about if theirs.get(name) != about[name]]:
            raise EncodeError(
                f"{folder} has vectors of another job ({', '.join(differ)} differ): choose another folder, or remove "
                "this one"
            )
    elif folder.exists() and any(name for name in os.listdir(folder) if not name.startswith(".nestling-")):
        raise FileError(f"{folder} exists and holds no vectors of nestling: choose another folder, or remove it")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_manifest(folder, about, None, None)


@contextmanager
def _running(job: Job, encoder: ElasticEncoder, config: EncodeConfig) -> Iterator[Job]:
    """The job with what its backend needs, in a folder that all workers see and that goes when they are done."""
    if config.backend == "torch":
        yield job
        return
    with temporary_folder(job.folder) as graphs:
        with naming(job.folder):
            write_graphs(encoder, job.sizes, graphs, config.backend == "onnx-int8")
        yield replace(job, graphs=graphs)


def _shards(job: Job, works: Iterator[Work], encoder: Any, config: EncodeConfig) -> Iterator[Shard]:
    if config.engine == "local":
        return in_this_process(job, works, encoder)
    engine = in_processes if config.engine == "processes" else config.engine
    return engine(job, works, config.worker_count)  # type: ignore[operator]


def _finish(folder: Path, about: dict[str, Any], done: dict[int, Shard], total: int) -> Vectors:
    if sorted(done) != list(range(len(done))) or sum(shard.rows for shard in done.values()) != total:
        raise EncodeError(f"{folder}: the corpus has changed while it was read: run the same command again")
    files = {name: sum for number in range(len(done)) for name, sum in done[number].files.items()}
    _remove_behind(folder, len(done))
    write_manifest(folder, about, total, files)
    return Vectors.open(folder)


def _remove_behind(folder: Path, count: int) -> None:
    """Remove our shards behind the last one: of an earlier corpus that was longer."""
    for note in folder.glob("part-?????*.json"):
        number = note.stem.removeprefix("part-")
        if number.isdigit() and int(number) >= count:
            for file in folder.glob(f"{stem(int(number))}.*"):
                file.unlink()
