"""mteb on any size of an encoder, without an export, and on your own pairs and retrieval sets.

from nestling.integrations.mteb import SizedModel, retrieval_task, sts_task

mteb.evaluate(SizedModel("minilm", "2x192"), [sts_task("pairs.jsonl"), retrieval_task("scifact")])
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nestling.data.pairs import read_sts
from nestling.data.retrieval import read_retrieval
from nestling.embed import ElasticEncoder
from nestling.embed.export.compatibility import longest
from nestling.embed.export.origin import origin_of
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.fingerprint import fingerprint
from nestling.embed.model.parts import Encoder
from nestling.integrations.libraries import library

if TYPE_CHECKING:
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
else:
    AbsEncoder = library("mteb.models.abs_encoder", "mteb").AbsEncoder
    ModelMeta = library("mteb.models", "mteb").ModelMeta
    AbsTaskRetrieval, AbsTaskSTS = (
        getattr(library("mteb.abstasks", "mteb"), name) for name in ("AbsTaskRetrieval", "AbsTaskSTS")
    )

BATCH = 32


class SizedModel(AbsEncoder):
    """A size of an encoder as mteb takes models: ``mteb.evaluate(SizedModel(encoder, "2x192"), tasks)``.

    Texts have the model's own prompts, by what mteb says that they are: queries, documents, or neither.

    Attributes:
        mteb_model_meta: name, size, width, languages, licence and base, as far as they are known; the revision is a
            checksum of the size's weights, so that mteb keeps its results apart from those of any other.

    Args:
        encoder: an `ElasticEncoder`, or what its ``from_pretrained`` loads; the folder of an exported size is one.
        size: such as ``"2x192"``; by default the full one.

    Raises:
        LoadError, LadderError, ExportError: there is no such encoder or size.
    """

    def __init__(self, encoder: ElasticEncoder | str | os.PathLike[str], size: Any = None):
        self.encoder = encoder if isinstance(encoder, ElasticEncoder) else ElasticEncoder.from_pretrained(encoder)
        parts = Encoder.of(self.encoder.model)
        full = Size(parts.depth, parts.dims)
        self.size = full if size is None else Ladder.parse([size]).full
        self.is_full = self.size == full
        self.model = self.encoder.model
        self.mteb_model_meta = self._meta()

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **options: Any) -> np.ndarray:
        """Vectors fp32 ``[n, dims]`` of the texts in batches ``{"text": [...]}``.

        Args:
            prompt_type: mteb's ``query`` or ``document``, or None.
            options: of which ``batch_size`` is read.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        use = {None: "sts", "query": "query", "document": "passage"}[getattr(prompt_type, "value", prompt_type)]
        said: dict[str, Any] = {"batch_size": int(options.get("batch_size", BATCH))}
        if use == "sts" or self.is_full:  # the full size of an adapter is then the stock model, to the last bit
            return self.encoder.encode(texts, self.size, prompt=stored_prompts(self.model)[use], **said)
        method = self.encoder.encode_query if use == "query" else self.encoder.encode_document
        return method(texts, self.size, **said)

    def _meta(self) -> "ModelMeta":
        cut, origin = self.encoder.cut(self.size), origin_of(self.model)
        count, transformer = sum(parameter.numel() for parameter in cut.parameters()), cast(Any, cut[0])
        stem = (origin.base or origin.name or "encoder").rpartition("/")[2]
        name = stem if stem.endswith(f"-{self.size}") else f"{stem}-{self.size}"
        languages = library("mteb.languages.iso_mappings", "mteb")._hf_langs_to_iso_lang_scripts
        facts: dict[str, Any] = {
            "name": f"nestling/{name}", "revision": fingerprint(cut)["weights"][:40], "loader": None,
            "release_date": None, "languages": languages(origin.facts.get("language")), "n_parameters": count,
            "n_embedding_parameters": transformer.model.get_input_embeddings().weight.numel(),
            "memory_usage_mb": sum(p.numel() * p.element_size() for p in cut.parameters()) / 2**20,
            "max_tokens": longest(cut), "embed_dim": self.size.dims, "license": origin.facts.get("license"),
            "open_weights": True, "public_training_code": None, "public_training_data": None,
            "framework": ["Sentence Transformers", "PyTorch"],
            "reference": f"https://huggingface.co/{origin.base}" if origin.base else None,
            "similarity_fn_name": library("mteb.models.model_meta", "mteb").ScoringFunction(cut.similarity_fn_name),
            "use_instructions": any(stored_prompts(cut).values()), "training_datasets": None,
            "adapted_from": origin.base or None,
        }  # fmt: skip
        try:
            return ModelMeta(**facts)
        except ValueError:  # a licence of a name that mteb does not know
            return ModelMeta(**{**facts, "license": None})


def sts_task(source: Any, name: str | None = None) -> "AbsTaskSTS":
    """Scored pairs of your own as a task of mteb, whose main score is Spearman's correlation of cosines.

    Args:
        source: what `read_sts` reads: a file of ``sentence1, sentence2, score``, or rows.
        name: of the task; by default the file's.

    Raises:
        DataError: it cannot be read.
    """
    rows = read_sts(source)
    scores = [row["score"] for row in rows]

    class Pairs(AbsTaskSTS):
        metadata = _metadata(_name(source, name), "STS", "cosine_spearman")
        min_score, max_score = min(scores), max(scores)

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            self.dataset = {"test": _table(rows, ("sentence1", "sentence2", "score"))}
            self.data_loaded = True

    return Pairs()


def retrieval_task(folder: str | os.PathLike[str], name: str | None = None) -> "AbsTaskRetrieval":
    """A retrieval set in the layout of BEIR as a task of mteb, whose main score is nDCG@10; gains are whole numbers.

    Args:
        folder: as of `read_retrieval`; ``FOLDER:SPLIT`` names another split than ``test``.
        name: of the task; by default the folder's.

    Raises:
        DataError: it cannot be read.
    """
    data = read_retrieval(folder)
    corpus, queries = ([{"id": key, "text": text} for key, text in d.items()] for d in (data.corpus, data.queries))

    class Searched(AbsTaskRetrieval):
        metadata = _metadata(_name(data.name, name), "Retrieval", "ndcg_at_10")
        ignore_identical_ids = bool(data.ignore_identical_ids)

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            split = {
                "corpus": _table(corpus, ("id", "text")),
                "queries": _table(queries, ("id", "text")),
                "relevant_docs": {query: {d: int(gain) for d, gain in gains.items()} for query, gains in
                                  data.relevant.items()},
                "top_ranked": None,
            }  # fmt: skip
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Searched()


def _table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> Any:
    return library("datasets", "mteb").Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def _name(source: Any, name: str | None) -> str:
    if name is None:
        name = Path(source).name.split(".")[0] if isinstance(source, str | os.PathLike) else "pairs"
    return re.sub(r"\W+", "-", name)


def _metadata(name: str, kind: str, score: str) -> Any:
    return library("mteb.abstasks.task_metadata", "mteb").TaskMetadata(
        name=name, description=f"{name}, a set of local files.", dataset={"path": name, "revision": "local"},
        type=kind, category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score=score,
    )  # fmt: skip
