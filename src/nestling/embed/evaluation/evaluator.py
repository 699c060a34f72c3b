"""Quality of every size from one encode pass per text: similarity (STS) and retrieval.

One forward of the whole encoder gives the vectors of all sizes, so that measuring six sizes costs little more than
measuring the full model alone. What is measured is what an exported size would give (`taps`).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn

from nestling.data.pairs import read_sts
from nestling.data.retrieval import Retrieval, read_retrieval
from nestling.embed.evaluation.metrics import BESIDE, ranking, spearman
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import TASKS, encode, stored_prompts, widths
from nestling.embed.model.fingerprint import checksum, reading
from nestling.embed.model.own import Projections, chosen
from nestling.embed.model.parts import Encoder
from nestling.embed.model.similarity import COSINE, Similarity
from nestling.errors import DataError, EvaluationError, OptionError
from nestling.files.writing import naming
from nestling.jobs.progress import progress_bar
from nestling.jobs.results import ResultStore
from nestling.options import flag, shown, text, whole
from nestling.report.results import read_rows, run_meta, write_json

FileName = str | os.PathLike[str]
Row = dict[str, Any]
_Encode = Callable[[Sequence[str], str], dict[int, Tensor]]  # texts and their use to vectors at each depth


@dataclass(frozen=True)
class _Scored:
    """An STS set: places of its sentences among all that are encoded, and its scores."""

    first: Tensor
    second: Tensor
    scores: list[float]


class GridEvaluator(BaseEvaluator):
    """Measures every size of an encoder, as an evaluator of sentence-transformers during training or by itself.

    Called during training it returns ``mean_sts`` and ``mean_ndcg`` of every size (``"6x128_mean_sts"``), their means
    over the sizes, and ``mean``, the mean of those, its ``primary_metric``. With an ``output_path`` it keeps the rows
    of every call there, in ``grid[_NAME].json``. By itself, `rows` gives a row a size.

    Pairs and documents are compared by the model's own similarity, which is the cosine unless it says otherwise
    (``similarity_fn_name``). Retrieval is exact search; gains are graded (see
    `nestling.embed.evaluation.metrics.ranking`). Sentences that occur several times, also in several sets, are encoded
    once.

    Args:
        ladder: the sizes that are measured, in any form that `Ladder.parse` takes; by default `Ladder.default` of the
            model. They need not include the full model.
        sts: scored pairs by the name of the set (``"sts12"``, ``"stsb"``): whatever `read_sts` reads.
        retrieval: retrieval sets by name: a BEIR folder (``FOLDER:dev`` for another split than ``test``), a
            `Retrieval`, or corpus, queries and judgements as BEIR's loader gives them.
        prompts: what is put in front of texts by their use, ``sts``, ``query`` or ``passage``. For those left out, the
            prompts that the model was saved with, see `stored_prompts`; ``""`` turns one off. `prompts_for` tells.
        projections: by depth, what is applied before vectors are cut, as a training has it; depths without one are
            measured as they are. By default those that the model was trained with, if there are any; ``{}`` for none.
        batch_size: texts in a forward.
        name: of the evaluator, in front of its metrics and in its file's name.
        progress: show a progress bar.

    Raises:
        DataError: a set cannot be read.
        EvaluationError: there is no set, or one that nothing can be measured on.
        LadderError: the ladder is none.

    Example:
        >>> evaluator = GridEvaluator("2x32,4x64,6x384", sts={"stsb": "stsb_test.jsonl"})
        >>> rows = evaluator.rows(model, method="cut")
    """

    def __init__(
        self,
        ladder: Ladder | str | Iterable[Any] | None = None,
        *,
        sts: Mapping[str, Any] | None = None,
        retrieval: Mapping[str, FileName | Retrieval | tuple[Any, Any, Any]] | None = None,
        prompts: Mapping[str, str] | None = None,
        projections: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        batch_size: int = 32,
        name: str = "",
        progress: bool = False,
    ):
        super().__init__()
        self.ladder = None if ladder is None else Ladder.parse(ladder)
        self.projections, self.batch_size = projections, whole("batch_size", batch_size)
        self.name, self.progress = text("name", name), flag("progress", progress)
        named = {"sts": sts, "retrieval": retrieval, "prompts": prompts, "projections": projections}
        for option, value in named.items():
            if value is not None and not isinstance(value, Mapping):
                raise OptionError(f"{option}={shown(value)}: expected a dict, by name")
        self.prompts = {use: text(f"prompts[{use}]", prompt) for use, prompt in (prompts or {}).items()}
        if unknown := set(self.prompts) - {"sts", "query", "passage"}:
            raise EvaluationError(f"unknown use of a prompt {sorted(unknown)}: expected sts, query or passage")
        if not sts and not retrieval:
            raise EvaluationError("nothing to measure: give sts or retrieval sets")
        self.sentences: dict[str, int] = {}
        self.sts = {key: self._scored(key, value) for key, value in (sts or {}).items()}
        self.retrieval = {key: _searched(key, value) for key, value in (retrieval or {}).items()}
        self.primary_metric = "mean"

    def _scored(self, name: str, source: Any) -> _Scored:
        if name in BESIDE or name.startswith(("ndcg_", "recall_", "mean_")):
            raise EvaluationError(f"an STS set cannot be called {name}: that is a column of the results")
        try:
            rows = read_sts(source)
        except DataError as error:
            if isinstance(source, str | os.PathLike):
                raise
            raise EvaluationError(f"{name}: {error}") from error
        scores = [row["score"] for row in rows]
        if len(set(scores)) < 2:
            raise EvaluationError(f"{name}: a correlation needs pairs with different scores, this set has none")
        first, second = (
            torch.tensor([self.sentences.setdefault(row[column], len(self.sentences)) for row in rows])
            for column in ("sentence1", "sentence2")
        )
        return _Scored(first, second, scores)

    def cups(self, model: nn.Module) -> list[Size]:
        """The sizes that are measured on that model, smallest first.

        Raises:
            LadderError: one is deeper or wider than the model.
        """
        encoder = Encoder.of(model)
        ladder = self.ladder or Ladder.default(encoder.depth, encoder.dims)
        # The ladder's own check wants the full size, which training needs and measuring does not.
        Ladder({*ladder, Size(encoder.depth, encoder.dims)}).check(encoder.depth, encoder.dims)
        return list(ladder)

    def metric_names(self, model: nn.Module) -> list[str]:
        """What a call during a training of that model returns.

        Raises:
            LadderError: a size is deeper or wider than the model.
        """
        kinds = ["mean_sts"] * bool(self.sts) + ["mean_ndcg"] * bool(self.retrieval)
        names = [*(f"{size}_{kind}" for size in self.cups(model) for kind in kinds), *kinds, "mean"]
        return [f"{self.name}_{name}" if self.name else name for name in names]

    def prompts_for(self, model: nn.Module) -> dict[str, str]:
        """The prompts that are used with that model, by use."""
        return stored_prompts(Encoder.of(model).model) | self.prompts

    def rows(
        self, model: nn.Module, *, model_name: str = "", method: str = "", partial: FileName | None = None
    ) -> list[Row]:
        """Measure a model.

        Args:
            model: a SentenceTransformer, perhaps wrapped.
            model_name, method: what the rows say in those columns.
            partial: a JSON file that is kept after the STS sets and after each retrieval set, and read if it exists:
                a killed measurement of the same weights, sizes, prompts and data goes on with the next set.

        Returns:
            A row a size: ``model, method, size``, Spearman's correlation for each STS set under its own name,
            ``ndcg_<set>`` and ``recall_<set>`` (nDCG@10, recall@100), and their means ``mean_sts, mean_ndcg,
            mean_recall``, all as fractions. A correlation that is not defined (all vectors equal) is NaN.

        Raises:
            EvaluationError: an embedding is not finite, or ``partial`` is damaged or of another measurement.
            LadderError, UnsupportedEncoderError: the model does not have those sizes.
        """
        sizes, prompts, projections = self.cups(model), self.prompts_for(model), chosen(self.projections, model)
        similarity = Similarity.of(Encoder.of(model).model)
        kept = ResultStore(partial, {} if partial is None else self._job(model, sizes, prompts, projections))
        parts: dict[str, Callable[[_Encode], dict[Size, Row]]] = {}
        if self.sts:
            parts["sts"] = bind(self._measure_sts, sizes, similarity)
        parts |= {f"retrieval {key}": bind(self._measure_retrieval, sizes, similarity, key) for key in self.retrieval}
        with progress_bar(self.progress) as bar:
            task = bar.add_task("encoding", total=sum(map(self._texts, parts)))

            def vectors(texts: Sequence[str], use: str) -> dict[int, Tensor]:
                return encode(
                    model, texts, widths(sizes), prompt=prompts[use], batch_size=self.batch_size,
                    projections=projections, advance=lambda count: bar.advance(task, count), task=TASKS.get(use),
                )  # fmt: skip

            for part, measure in parts.items():
                if part in kept.done:
                    bar.advance(task, self._texts(part))
                else:
                    kept.done[part] = {size.name: metrics for size, metrics in measure(vectors).items()}
                    kept.save()
        rows, names = [], [size.name for size in sizes]
        measured = [kept.columns(part, names) for part in parts]
        for size in sizes:
            metrics = {key: value for columns in measured for key, value in columns[size.name].items()}
            rows.append({"model": model_name, "method": method, "size": size.name, **metrics, **_means(metrics)})
        return rows

    def _texts(self, part: str) -> int:
        """How many texts are encoded for a part."""
        if part == "sts":
            return len(self.sentences)
        data = self.retrieval[part.removeprefix("retrieval ")]
        return len(data.corpus) + len(data.queries)

    def _job(
        self, model: nn.Module, sizes: list[Size], prompts: dict[str, str], projections: Projections
    ) -> dict[str, Any]:
        """What the numbers depend on."""
        modules = {depth: module for depth, module in projections.items() if isinstance(module, nn.Module)}
        inner = Encoder.of(model).model
        similarity = Similarity.of(inner)
        sts = [[data.first.tolist(), data.second.tolist(), data.scores] for data in self.sts.values()]
        return {
            "weights": checksum(inner),
            **reading(inner),
            "projections": {str(depth): checksum(module) for depth, module in modules.items()},
            "cups": [size.name for size in sizes],
            "prompts": prompts,
            **({} if similarity == COSINE else {"similarity": [similarity.name, similarity.unit]}),
            "sts": [list(self.sts), checksum([list(self.sentences), sts])],
            "retrieval": {
                name: checksum([data.corpus, data.queries, data.relevant] + [True] * bool(data.ignore_identical_ids))
                for name, data in self.retrieval.items()
            },
        }

    def _measure_sts(self, sizes: list[Size], similarity: Similarity, vectors: _Encode) -> dict[Size, Row]:
        found, encoded = {}, vectors(list(self.sentences), "sts")
        for size in sizes:
            cut = encoded[size.layers][:, : size.dims]
            found[size] = {
                name: spearman(cut[data.first], cut[data.second], data.scores, similarity)
                for name, data in self.sts.items()
            }
        return found

    def _measure_retrieval(
        self, sizes: list[Size], similarity: Similarity, name: str, vectors: _Encode
    ) -> dict[Size, Row]:
        data = self.retrieval[name]
        documents = sorted(data.corpus)  # equal scores are then ranked as sentence-transformers ranks them, by id
        place = {key: number for number, key in enumerate(documents)}
        relevant = [
            {place.get(key, -1 - missing): gain for missing, (key, gain) in enumerate(data.relevant[query].items())}
            for query in data.queries
        ]
        itself = [place.get(query) for query in data.queries] if data.ignore_identical_ids else None
        corpus = vectors([data.corpus[key] for key in documents], "passage")
        queries, found = vectors(list(data.queries.values()), "query"), {}
        for size in sizes:
            asked, there = queries[size.layers][:, : size.dims], corpus[size.layers][:, : size.dims]
            ndcg, recall = ranking(asked, there, relevant, itself, similarity)
            found[size] = {f"ndcg_{name}": ndcg, f"recall_{name}": recall}
        return found

    def __call__(
        self, model: nn.Module, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure during training: see the class. ``epoch`` and ``steps`` say when, -1 for not in training.

        Raises:
            As `rows`; EvaluationError also if the file of earlier calls is damaged.
        """
        rows = self.rows(model)
        kinds = [key for key in ("mean_sts", "mean_ndcg") if key in rows[0]]
        metrics: dict[str, float] = {f"{row['size']}_{key}": row[key] for row in rows for key in kinds}
        metrics |= {key: sum(row[key] for row in rows) / len(rows) for key in kinds}
        metrics["mean"] = sum(metrics[key] for key in kinds) / len(kinds)
        if output_path is not None:
            self._keep(Path(output_path), [{"epoch": epoch, "steps": steps, **row} for row in rows])
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(Encoder.of(model).model, metrics, int(epoch), steps)
        return metrics

    def _keep(self, folder: Path, rows: list[Row]) -> None:
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"grid{'_' * bool(self.name)}{self.name}.json"
        earlier = read_rows(path, EvaluationError) if os.path.lexists(path) else []
        write_json(path, [*earlier, *rows], run_meta())

    def get_config_dict(self) -> dict[str, Any]:
        """What sentence-transformers writes into a model card."""
        return {"ladder": str(self.ladder)} if self.ladder else {}


def _searched(name: str, source: FileName | Retrieval | tuple[Any, Any, Any]) -> Retrieval:
    if isinstance(source, tuple):
        return Retrieval.of(name, *source)
    if not isinstance(source, Retrieval):
        return read_retrieval(source)
    if source.ignore_identical_ids is not None:
        return source
    return Retrieval.of(source.name, source.corpus, source.queries, source.relevant)


def _means(metrics: Mapping[str, float]) -> dict[str, float]:
    kinds: dict[str, list[float]] = {}
    for key, value in metrics.items():
        kind = next((k for k in ("ndcg", "recall") if key.startswith(f"{k}_")), "sts")
        kinds.setdefault(f"mean_{kind}", []).append(value)
    return {kind: sum(values) / len(values) for kind, values in kinds.items()}
