"""`ElasticEncoder`: a text encoder, its sizes and its projections in one object and one folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn

from nestling.embed.adapter import ElasticAdapter, adapter_for
from nestling.embed.evaluation.agreement import agreement, full_vectors
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.export.card import card_of
from nestling.embed.export.export import Exported, export
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import strings_of
from nestling.embed.model.folder import check_place, load_info, load_ladder, load_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.own import own_projections
from nestling.embed.model.parts import Encoder
from nestling.embed.pretraining.pretrain import pretrain
from nestling.embed.sized import AnySize, SizedEncoder
from nestling.embed.training.align import align
from nestling.embed.training.config import TrainConfig
from nestling.embed.training.data import Examples
from nestling.embed.training.distil import distil
from nestling.embed.training.refit import refit
from nestling.embed.training.result import Trained, save, weight_bytes
from nestling.embed.training.train import train
from nestling.errors import FileError, OptionError
from nestling.files.hub import upload
from nestling.options import flag, path, text, whole


class ElasticEncoder(SizedEncoder):
    """A text encoder of several sizes, each of some layers and some coordinates, out of one set of weights.

    Make it with `from_pretrained`. A size never changes the model that it is cut from: several threads may encode at
    different sizes at once.

    Attributes:
        model: the stock SentenceTransformer.
        sizes: the sizes that are aligned, trained, measured and saved together, smallest first, the full one last.
        projections: by depth, what is applied to pooled vectors before they are cut; empty before `align` or `train`.
        adapter: what small sizes were trained by, beside the model's own weights; None without such a training.
        info: how the sizes were made, as in ``nestling.json``: ``{"training": {...}}`` or ``{"alignment": {...}}``.
        rows: what `evaluate` or `agreement` measured last.

    Example:
        >>> encoder = ElasticEncoder.from_pretrained("minilm")
        >>> vectors = encoder.encode(texts, size="3x256")
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | SentenceTransformer,
        sizes: Any = None,
        *,
        adapter: str | os.PathLike[str] | ElasticAdapter | None = "auto",
        pooling: str | None = None,
    ) -> ElasticEncoder:
        """Load an encoder, with the sizes and projections that lie beside it, if there are any.

        Args:
            name: the alias ``minilm``, a folder in any release's format, a hub id, or a SentenceTransformer, which is
                taken as it is.
            sizes: by default those that the encoder or its adapter was saved with, or some for its shape.
            adapter: of trained small sizes: an `ElasticAdapter`, or what `ElasticAdapter.from_pretrained` loads.
                ``"auto"`` is the one that lies beside the model or, for an alias and if it has all depths of
                ``sizes``, that of the package. None: without one.
            pooling: ``"mean"`` or ``"cls"`` for a folder of transformers' own, which has none.

        Raises:
            LoadError: there is no such encoder, it is damaged, or it is no sentence encoder.
            LadderError: what lies beside it is damaged, or the sizes do not fit it.
            AdapterError: the adapter is damaged, or of another model.
        """
        if isinstance(name, nn.Module):
            model, own, projections, info = name, None, own_projections(name), {}
        else:
            model = load_encoder(name, pooling)
            own, projections, info = load_ladder(name), load_projections(name), load_info(name)
        chosen = adapter_for(model, name, adapter, sizes)
        if chosen is not None:
            own, info = own or chosen.sizes, {"training": chosen.info}
        return cls(model, own if sizes is None else sizes, projections, info, chosen)

    def align(
        self, texts: Iterable[Any], *, prompt: str | None = None, batch_size: int = 32, progress: bool = True
    ) -> ElasticEncoder:
        """Let small sizes agree with the full one, in closed form, from one pass over texts without labels.

        It sets `projections`: reduced-rank regressions of the full model's vectors on those of each depth. Weights
        stay as they are, and so does the full size, unless narrower ones share its depth: then it is centred too. With
        an `adapter`, its maps are fitted to the texts, in its space.

        Args:
            texts: some thousands like those that will be embedded, as strings or rows with a column ``text``, in a
                list, a data frame, a data set or any iterable; 10,000 of them, from all over, are read.
            prompt: in front of each text; by default the one that ``encode`` uses by itself.
            batch_size: texts in a forward.
            progress: show a progress bar.

        Returns:
            The encoder itself.

        Raises:
            ExampleError: there are no texts, one is blank or no string, or all are the same.
            LadderError, UnsupportedEncoderError: the sizes do not fit the model.
            OptionError: an option cannot be, or all sizes are the full one, so that there is nothing to align.
        """
        options: dict[str, Any] = {"prompt": prompt, "batch_size": batch_size, "progress": progress}
        if self.adapter is not None:
            self._adapt(refit(self.adapter, self.model, texts, **options)[0])
            self.info, self.rows = {"training": self.adapter.info}, []
            return self
        self.projections, info = align(self.model, texts, self.sizes, **options)
        self.info = {"alignment": info}
        return self

    def train(
        self,
        data: Any,
        config: TrainConfig | None = None,
        *,
        evaluator: BaseEvaluator | Sequence[BaseEvaluator] | None = None,
        teacher: ElasticEncoder | SentenceTransformer | None = None,
        loss: Any = None,
    ) -> ElasticEncoder:
        """Train every size, so that it is good by itself; it never ends below its start on what is measured.

        It starts from the encoder's projections, or else from those that `align` would find. The start and ten
        checkpoints are measured: by the evaluator, or else on some rows of the data, which are then not trained on.
        The best checkpoint is kept, and the start where none is better: ``info["training"]["kept"]`` says which.

        What is learned follows from the data:

        * pairs (`read_pairs`): MultipleNegativesRankingLoss at every size, and small ones follow the full one;
        * scored pairs (`read_sts`): CoSENTLoss likewise;
        * texts: no labels, and **the full model stays as it is**. Small sizes learn to write its vectors: low-rank
          changes that only they read, in an `adapter`, and a projection for each depth into one space. The teacher
          is the model itself, or another one.

        A training that is stopped by an error or an interrupt puts the model back as it was; ``resume=True`` goes on
        from the last checkpoint. Under ``torchrun`` every process calls this; the loss is that of the global batch.

        Args:
            data: strings, or rows with the columns ``anchor, positive[, negative...]``, ``query, passage[,
                negative...]``, ``sentence1, sentence2, score``, ``text``, or another form of `read_pairs`; with a
                ``loss`` of your own, any columns of texts and one of labels. In a list, a data frame, a data set or
                any other iterable. What is left out of them is counted in ``info["training"]["left_out"]``.
            config: see `TrainConfig`; with an ``output_dir`` the result is saved there, and can be resumed.
            evaluator: measures on held-out data before, ten times during and after the training. If it has no sizes,
                or no projections, it is given those of the training. Evaluators of sentence-transformers measure the
                full model; of a list the last one counts.
            teacher: another encoder, of any kind and width, that all sizes follow, beside the loss if there are pairs.
            loss: a base loss of the model for `StarbucksLoss`, its class or the name of that, a function that makes
                one, or a whole `StarbucksLoss`.

        Returns:
            The encoder itself.

        Raises:
            ExampleError: the rows cannot be trained on (which one, and why).
            LadderError, UnsupportedEncoderError: the sizes do not fit the model.
            OptionError: an option is out of range or unknown, or two do not go together. Like all of the above it is
                raised before anything is computed or written.
            EvaluationError: the evaluator cannot measure this model.
            TrainingError: the loss or a gradient is not finite (step and part are named), a checkpoint cannot be
                written, or the folders are another training's. The last whole checkpoint is kept.
        """
        guide = teacher.model if isinstance(teacher, ElasticEncoder) else teacher
        config, examples = TrainConfig.of(config), Examples.of(data, own_loss=loss is not None)
        if examples.kind == "texts" and loss is None:
            if config.output_dir is not None:
                check_place(config.output_dir, "training", config.resume, weight_bytes(self.model))
            adapter = distil(self.model, examples, self.sizes, config, teacher=guide, evaluator=evaluator)
            self._adapt(adapter)
            self.sizes, self.info, self.rows = adapter.sizes, {"training": adapter.info}, []
            if config.output_dir is not None:
                self._save(config.output_dir, resumed=config.resume)
            return self
        sizes = None if isinstance(getattr(loss, "cups", None), Ladder) else self.sizes
        trained = train(
            self.model, examples, sizes, config, projections={} if self.adapter else self.projections, loss=loss,
            teacher=guide, evaluator=evaluator,
        )  # fmt: skip
        return self._became(trained, "training")

    def pretrain(self, texts: Any, config: Any) -> ElasticEncoder:
        """Pre-train the model as a masked autoencoder at every size (SMAE): a start for `train`, not yet an encoder.

        Args:
            texts: a file or data set as `nestling.data.texts.read_texts` names them, `Texts` of several, or strings or
                rows with a field ``text`` in anything that can be read again.
            config: see `PretrainConfig`.

        Returns:
            The encoder itself.

        Raises:
            As `nestling.embed.pretraining.pretrain.pretrain`.
        """
        return self._became(pretrain(self.model, texts, self.sizes, config), "pretraining")

    def evaluate(
        self,
        sts: Mapping[str, Any] | None = None,
        retrieval: Mapping[str, Any] | None = None,
        *,
        evaluator: GridEvaluator | None = None,
        prompts: Mapping[str, str] | None = None,
        batch_size: int = 32,
        method: str = "",
        model_name: str | None = None,
        partial: str | os.PathLike[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure every size on scored pairs and retrieval sets, from one forward a text.

        Args:
            sts, retrieval, prompts, batch_size: as of `GridEvaluator`.
            evaluator: one that was made beforehand, in place of these.
            method, model_name: what the rows say in those columns; by default the name that it was loaded by.
            partial: a JSON file by which a killed measurement goes on.

        Returns:
            A row a size, as of `GridEvaluator.rows`; kept in `rows` for `choose` and the cards of exports.

        Raises:
            As `GridEvaluator` and `GridEvaluator.rows`.
        """
        if evaluator is None:
            evaluator = GridEvaluator(
                sts=sts, retrieval=retrieval, prompts=prompts, batch_size=batch_size, progress=True
            )
        elif sts or retrieval:
            raise OptionError("an evaluator has its own sts and retrieval: leave those out")
        evaluator = copy(evaluator)
        evaluator.ladder = evaluator.ladder or self.sizes
        name = str(self.model.model_card_data.base_model or "") if model_name is None else model_name
        sizes, rows = evaluator.cups(self.model), dict[str, dict[str, Any]]()
        for number, (model, projections, some) in enumerate(self._groups(map(self._size, sizes))):
            measures = copy(evaluator)
            measures.ladder, measures.projections = Ladder(some), projections
            place = partial if partial is None or not number else f"{os.fspath(partial)}.{number}"
            found = measures.rows(model, model_name=name, method=method, partial=place)
            rows |= {row["size"]: row for row in found}
        self.rows = [rows[size.name] for size in sizes]
        return self.rows

    def agreement(
        self,
        texts: Iterable[Any],
        *,
        reference: Tensor | None = None,
        prompt: str | None = None,
        method: str = "",
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """How well every size agrees with the full one on plain texts, where there are no labels; see `agreement`.

        Returns:
            A row a size: ``method, size, agreement, overlap``; kept in `rows` for `choose` and the cards of exports.

        Raises:
            EvaluationError: there are too few texts, or they are none.
        """
        whole("batch_size", batch_size)
        said, rows = strings_of(texts), dict[str, dict[str, Any]]()
        groups = self._groups(map(self._size, self.sizes))
        if reference is None and len(groups) > 1 and len(said) > 1:
            reference = full_vectors(self.model, said, prompt, batch_size)
        for model, projections, some in groups:
            found = agreement(
                model, said, some, reference, projections=projections, prompt=prompt, method=method,
                batch_size=batch_size,
            )  # fmt: skip
            rows |= {row["size"]: row for row in found}
        self.rows = [rows[size.name] for size in self.sizes]
        return self.rows

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that stock sentence-transformers loads as the full model, and `from_pretrained` as it is.

        Raises:
            FileError: it exists, or cannot be written.
        """
        self._save(path("folder", folder))

    def _save(self, folder: Path, resumed: bool = False) -> None:
        name = next(iter(self.info), "")
        info = self.info.get(name, {})
        projections = {} if self.adapter is not None else self.projections
        trained = Trained(folder, self.sizes, projections, info, self.adapter)
        save(self.model, trained, name, card_of(self.model, self.sizes, name, info, projections), resumed)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the encoder to the hub and return its address. Other files of the repository stay as they are.

        Raises:
            FileError: the repository cannot be made or written to.
        """
        return upload(
            self.save_pretrained, text("repo_id", repo_id), private=flag("private", private), token=token,
            message="nestling encoder", failure=FileError,
        )  # fmt: skip

    def export(
        self,
        size: AnySize,
        folder: str | os.PathLike[str],
        *,
        onnx: bool = False,
        int8: bool = False,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> Exported:
        """Write a size as a stock model of its own, checked against this one; see `nestling.embed.export.export`.

        Args:
            size: such as ``"2x96"``.
            folder: must not exist yet.
            onnx: also write an ONNX graph: ids and mask to embeddings, any batch and length.
            int8: also write one with int8 weights.
            rows: for the model card's table; by default what was measured last.

        Raises:
            ExportError, ExportFileError, LadderError: as there.
        """
        wanted = self._size(size)
        ((model, projections, _),) = self._groups([wanted])
        parts = Encoder.of(model)
        ladder = Ladder({wanted, *(each for each in self.sizes if each.layers <= parts.depth)})
        return export(
            model, wanted, Path(folder), ladder=ladder, projections=projections,
            rows=self.rows if rows is None else rows, onnx=onnx, int8=int8,
        )  # fmt: skip

    def _became(self, trained: Trained, name: str) -> ElasticEncoder:
        self._adapt(None)
        self.sizes, self.projections, self.rows = trained.ladder, trained.projections, []
        self.info = {name: trained.info}
        return self
