"""One small artefact of every kind that users have on disks, and what reading each of them means."""

import contextlib
import gzip
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch

from nestling import kv
from nestling.data.pairs import read_pairs, read_sts
from nestling.data.retrieval import read_retrieval
from nestling.data.texts import read_multiple_choice, read_texts
from nestling.embed.export.export import export
from nestling.embed.model.folder import load_ladder, load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.pretraining.pretrain import Place, pretrain
from nestling.errors import AdapterError, BudgetError, EvaluationError
from nestling.files.gguf import check_gguf
from nestling.files.reading import read_object
from nestling.jobs.checkpoints import begin
from nestling.jobs.results import ResultStore
from nestling.models import load_model
from nestling.report.results import read_rows
from tests.embed.ways import align, train

from ..embed.families import save_backbone, sentence_model, some_texts
from ..embed.pretraining.test_pretrain import config as pretrain_config
from ..kv.families import BASE, tiny_fit, tiny_model


@dataclass(frozen=True)
class Artefact:
    """A kind of folder.

    Attributes:
        folder: an undamaged one.
        read: reads a copy, as users do; what it gives is compared.
        sealed: whether a checksum tells of damage to a file of that name.
        weight: how often it is damaged, beside others.
    """

    folder: Path
    read: Callable[[Path], Any]
    sealed: Callable[[str], bool] = lambda name: False
    weight: int = 1


def artefacts(place: Path) -> dict[str, Artefact]:
    """All kinds, made below ``place``."""
    ids = torch.randint(3, BASE["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama-gqa")
    return {
        **_adapters(place, model, ids),
        **_caches(place, model, ids),
        **_checkpoints(place, model, ids),
        **_encoders(place),
        **_data(place),
        **_results(place),
        **_models(place),
    }


def _adapters(place: Path, model: Any, ids: torch.Tensor) -> dict[str, Artefact]:
    config = kv.SearchConfig(windows=1, length=64, sinks=2, window=4)
    fitted = kv.search(model, None, ids, tiny_fit(model, ids), config, progress=False)
    curve = [{"step": 0, "tokens": 0, "kl_0.5": 0.2}, {"step": 4, "tokens": 64, "kl_0.5": 0.1}]
    said = dict(preset="default", sampling="path", allocation="energy", sinks=4, window=64, tokens=64, seconds=3)
    fitted.info["training"] = {**said, "learning_rate": 0.002, "curve": curve}
    fitted.save_pretrained(place / "adapter")
    shutil.copytree(place / "adapter", place / "old")
    for new, old in (
        ("nestling_adapter.json", "adapter_config.json"),
        ("nestling_adapter.safetensors", "adapter_model.safetensors"),
    ):
        (place / "old" / new).rename(place / "old" / old)
    config = json.loads((place / "old" / "adapter_config.json").read_text())
    for key in ("sha256", "card", "card_sha256"):
        del config[key]
    (place / "old" / "adapter_config.json").write_text(json.dumps(config))

    def read(folder: Path) -> Any:
        found = kv.KVAdapter.from_pretrained(folder)
        with contextlib.suppress(AdapterError, BudgetError):  # of another model, or without bits, as it says now
            kv.NestedCache(model, found, kv.CacheConfig(budget=0.75, quantise=False, window=2, context=512))
            kv.NestedCache(model, found, kv.CacheConfig(budget=0.5, window=2, context=512))
        found.card = ""
        found.save_pretrained(folder / "saved")
        values = (found.encode, found.mean, found.drop_cost, found.quantisation_cost, found.step)
        return [tensor for value in values for tensor in value.values()] + list(found.paths.values())

    sealed = "nestling_adapter.safetensors".__eq__
    return {"adapter": Artefact(place / "adapter", read, sealed, 3), "old adapter": Artefact(place / "old", read)}


def _caches(place: Path, model: Any, ids: torch.Tensor) -> dict[str, Artefact]:
    adapter = kv.KVAdapter.from_pretrained(place / "adapter")
    cache = kv.NestedCache(model, adapter, kv.CacheConfig(budget=0.5, sinks=2, window=2, context=512))
    with torch.no_grad():
        model(input_ids=ids[:2, :50], past_key_values=cache)
    (place / "cache").mkdir()
    cache.save(place / "cache" / "cache.safetensors")

    def read(folder: Path) -> Any:
        again = kv.NestedCache.load(folder / "cache.safetensors", model, adapter)
        return [state for pair in again for state in pair[:2]]

    return {"cache": Artefact(place / "cache", read, lambda name: True)}


def _checkpoints(place: Path, model: Any, ids: torch.Tensor) -> dict[str, Artefact]:
    adapter = kv.KVAdapter.from_pretrained(place / "adapter")
    config = kv.TrainConfig(
        tokens=8 * 2 * 64, length=64, batch_size=2, sinks=2, window=4, budgets=[0.75], progress=False,
        output_dir=place / "training", arguments={"save_steps": 4},
    )  # fmt: skip
    kv.train(model, None, ids, adapter, config)
    encoder = sentence_model(save_backbone("bert", place / "bert"))
    quick = dict(steps=4, save_steps=2, batch_size=4, progress=False, use_cpu=True)
    pretrain(encoder, some_texts(20, longest=9), "1x8,4x32", pretrain_config(output_dir=place / "pre", **quick))
    encoder = sentence_model(place / "bert")
    pairs = [{"anchor": text, "positive": f"{text} w9"} for text in dict.fromkeys(some_texts(20, longest=9))]
    train(encoder, pairs, "1x8,4x32", folder=place / "trained", **quick)
    found = {}
    checks = {"training": lambda path: None, "pre-checkpoints": Place.of, "trained-checkpoints": lambda path: None}
    for name, check in checks.items():
        job = read_object(place / name / "training.json")

        newest = _newest(place / name)

        def read(folder: Path, job=job, check=check, newest=newest) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                last = begin(folder, job, True, check)
            files = sorted(path for path in last.rglob("*") if path.is_file() and path.name not in _UNREAD)
            sums = {path.relative_to(last): hashlib.sha256(path.read_bytes()).digest() for path in files}
            return [last.name, *sums.items()] if last.name == newest else []

        found[name] = Artefact(place / name, read, lambda name: name not in _UNREAD, 2)
    return found


_UNREAD = (
    "training_args.bin",
    "README.md",
    "checksums.json",
    "training.json",
    "teacher.npy",
    "projections.safetensors",
)


def _newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


def _encoders(place: Path) -> dict[str, Artefact]:
    texts = some_texts(30, longest=9)
    encoder = sentence_model(place / "bert")
    aligned = align(encoder, texts, "1x8,2x16,4x32", folder=place / "aligned", progress=False)
    export(encoder, "2x16", place / "cup", ladder=aligned.ladder, projections=aligned.projections)

    def read(folder: Path) -> Any:
        found = load_encoder(folder)
        ladder, turns = load_ladder(folder), load_projections(folder)
        vectors = torch.as_tensor(found.encode(texts[:2], show_progress_bar=False))
        return [vectors, *(turn.encode for turn in turns.values()), str(ladder)]

    def sealed(name: str) -> bool:
        return name.endswith(".safetensors")

    return {name: Artefact(place / name, read, sealed, 3) for name in ("aligned", "cup")}


def _data(place: Path) -> dict[str, Artefact]:
    texts = list(dict.fromkeys(some_texts(60)))
    folder = place / "data"
    folder.mkdir()
    rows = {
        "texts": [{"text": text} for text in texts],
        "pairs": [{"anchor": text, "positive": f"{text} w9"} for text in texts],
        "sts": [{"sentence1": a, "sentence2": b, "score": 0.5} for a, b in zip(texts, texts[1:], strict=False)],
        "choices": [{"question": text, "choices": ["a", "b"], "answer": 1} for text in texts],
    }
    for name, some in rows.items():
        raw = "".join(json.dumps(row) + "\n" for row in some).encode()
        (folder / f"{name}.jsonl").write_bytes(raw)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(raw))
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "texts.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    tsv = "anchor\tpositive\n" + "".join(f"{text}\tw9\n" for text in texts)
    (folder / "pairs.tsv.gz").write_bytes(gzip.compress(tsv.encode()))
    pandas.DataFrame(rows["pairs"]).to_parquet(folder / "pairs.parquet")
    (folder / "pairs.csv").write_text("anchor,positive\n" + "".join(f'"{text}",w9\n' for text in texts))
    readers = {"texts": read_texts, "pairs": read_pairs, "sts": read_sts, "choices": read_multiple_choice}

    found = {}
    for path in sorted(folder.iterdir()):

        def read(folder: Path, name: str = path.name) -> None:
            for _ in readers[name.split(".")[0]](folder / name):
                pass

        alone = place / "alone" / path.name
        alone.mkdir(parents=True)
        path.rename(alone / path.name)
        found[path.name] = Artefact(alone, read)
    beir = place / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    (beir / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(texts[:9]))
    )
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(9))
    )
    found["beir"] = Artefact(beir, read_retrieval, weight=2)
    return found


def _results(place: Path) -> dict[str, Artefact]:
    job = {"model": "tiny", "length": 64, "prompts": {"query": "q: "}}
    folder = place / "partial"
    folder.mkdir()
    kept = ResultStore(folder / "kept.json", job)
    kept.done = {"sums": [0.5, 1.5, 2.0, 3.0, 4.0], "sts": {"1x8": {"a": 0.25, "b": float("nan")}, "4x32": {"a": 1.0}}}
    kept.save()

    def read(folder: Path) -> Any:
        path = folder / "kept.json"
        if not path.is_file() and not path.is_symlink() and not path.exists():
            raise EvaluationError(f"{path} is gone, and everything is measured again")
        found = ResultStore(path, job)
        if not found.done.keys() >= {"sums", "sts"}:
            return []  # what is missing is measured again
        return [*found.numbers("sums", 5), str(found.columns("sts", ("1x8", "4x32")))]

    rows = place / "rows"
    rows.mkdir()
    (rows / "rows.json").write_text(
        json.dumps({"rows": [{"cup": "1x8", "a": 0.5}, {"cup": "4x32", "a": None}], "meta": {}})
    )
    return {
        "partial": Artefact(folder, read, "kept.json".__eq__, 2),
        "rows": Artefact(rows, lambda folder: read_rows(folder / "rows.json", EvaluationError) and None),
    }


def _models(place: Path) -> dict[str, Artefact]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = {name: number for number, name in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, 97))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    tiny_model("llama-gqa").save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return {"model": Artefact(place / "model", lambda folder: load_model(folder) and None, weight=2)} | _ggufs(place)


def _ggufs(place: Path) -> dict[str, Artefact]:
    try:
        import gguf
    except ImportError:
        return {}
    (place / "gguf").mkdir()
    writer = gguf.GGUFWriter(place / "gguf" / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list([f"w{i}" for i in range(50)])
    writer.add_token_types([1] * 50)
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()

    def read(folder: Path) -> None:
        check_gguf(folder / "tiny.gguf")
        try:
            gguf.GGUFReader(folder / "tiny.gguf")
        except Exception:  # which `load_model` turns into a LoadError; what it takes is what is watched
            return

    return {"gguf": Artefact(place / "gguf", read)}
