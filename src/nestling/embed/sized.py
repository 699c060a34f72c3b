"""A text encoder read at any size: its first layers, and the first coordinates of their projected vectors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor

from nestling.embed.adapter import ElasticAdapter
from nestling.embed.evaluation.choose import chosen_size, measured_speeds
from nestling.embed.export.export import cut_out, projection_of
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import TASKS, encode, served_prompts, stored_prompts, strings_of, widths
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity, Vectors, joined
from nestling.errors import AdapterError, OptionError
from nestling.options import number, shown, text, whole

AnySize = str | Size | tuple[int, int]


class SizedEncoder:
    """The part of an `ElasticEncoder` that only reads: vectors of any size, and which one to choose."""

    def __init__(
        self,
        model: SentenceTransformer,
        sizes: Any = None,
        projections: Mapping[int, Projection] | None = None,
        info: Mapping[str, Any] | None = None,
        adapter: ElasticAdapter | None = None,
    ):
        """
        Args:
            model: a SentenceTransformer, which is used as it is, without a copy.
            sizes: such as ``"1x64,2x96,6x384"``, or names or pairs (layers, dims); by default some for its shape.
            projections: ``{depth: Projection}``.
            info: see the class.
            adapter: see the class; it brings its own projections.

        Raises:
            UnsupportedEncoderError: the model has no layers to cut.
            LadderError: a size is deeper or wider than the model.
            AdapterError: the adapter is of another model.
        """
        parts = Encoder.of(model)
        full = Size(*_shape(parts))
        ladder = Ladder.default(*_shape(parts)) if sizes is None else Ladder.parse(sizes)
        Ladder({*ladder, full}).check(*_shape(parts))  # the full size itself may be left out where nothing is trained
        self.model, self.sizes = parts.model, ladder
        self.projections: dict[int, Projection] = dict(projections or {})
        self.info: dict[str, Any] = dict(info or {})
        self.rows: list[dict[str, Any]] = []
        self.adapter: ElasticAdapter | None = None
        self._body: SentenceTransformer | None = None
        if adapter is not None:
            self._adapt(adapter)

    def _adapt(self, adapter: ElasticAdapter | None) -> None:
        """Read small sizes with an adapter, or without one."""
        self._body = None if adapter is None else adapter.body(self.model)
        self.adapter = adapter
        device = self.model.device
        turns = {} if adapter is None else adapter.projections
        self.projections = {depth: copy.deepcopy(turn).to(device) for depth, turn in turns.items()}

    @property
    def space(self) -> str | None:
        """The id of the space that an adapter's sizes share; None without one, where each depth has its own."""
        return None if self.adapter is None else self.adapter.space

    def encode(
        self,
        texts: Any,
        size: AnySize | None = None,
        *,
        sizes: Iterable[AnySize] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        convert_to_tensor: bool = False,
    ) -> Any:
        """The vectors of texts at any size, from one forward through as many layers as that takes.

        They are those of the exported size: of unit length, unless the model compares by something else than cosines.

        Args:
            texts: a string, or strings in a list, an array, a data frame or a data set with a column ``text``.
            size: such as ``"2x96"``; by default the full one.
            sizes: several, which together cost what the deepest one does.
            prompt_name: of the model's prompts, such as ``"query"``; by default the one that it uses by itself.
            prompt: in front of each text, instead of a stored one; ``""`` for none.
            batch_size: texts in a forward.
            convert_to_tensor: tensors on the CPU, not arrays.

        Returns:
            fp32 ``[n, dims]``, or ``[dims]`` for a string; with ``sizes`` a dict of them by the size's name.

        Raises:
            LadderError: the model does not have that size.
            OptionError: there is no such prompt, or ``size`` and ``sizes`` are both given.
            EvaluationError: texts are no strings, or a vector is not finite.
            ExportError: there are projections, and none for that depth.
        """
        wanted = self._wanted(size, sizes)
        options: dict[str, Any] = {"prompt": self._prompt(prompt_name, prompt), "batch_size": batch_size}
        found = self._encoded(texts, wanted, as_tensors=convert_to_tensor, **options)
        return found[wanted[0].name] if sizes is None else found

    def encode_query(
        self, texts: Any, size: AnySize | None = None, *, sizes: Iterable[AnySize] | None = None,
        documents: AnySize | None = None, space: str | None = None, batch_size: int = 32,
        convert_to_tensor: bool = False,
    ) -> Any:  # fmt: skip
        """The vectors of queries, with the model's prompt for them, to be compared with those of `encode_document`.

        With an adapter all sizes share one space: vectors of any two sizes are compared by their first coordinates,
        as many as the narrower one has. The full size is written in that space as well; its cosines are those of
        `encode`, up to rounding.

        Args:
            texts, sizes, batch_size, convert_to_tensor: as of `encode`.
            size: such as ``"6x384"``; by default the full one.
            documents: the size that the documents were encoded at, if it is a smaller one. Then a query's vector is
                the sum of both sizes' unit vectors, as wide as the documents', and of unit length: what a small size
                gets wrong of documents it gets wrong of queries too, so that this finds more than either alone.
            space: the id that the documents' vectors were kept with; another space than this encoder's is refused.

        Raises:
            AdapterError: the space is another one, the adapter's teacher was another model, so that the full size is
                not in its space, or there is no adapter and documents of another depth.
            OptionError: documents are wider than the queries, or there are ``sizes`` beside them.
            LadderError, OptionError, EvaluationError, ExportError: as `encode`.
        """
        options: dict[str, Any] = {"as_tensors": convert_to_tensor, "batch_size": batch_size}
        if documents is None:
            return self._in_space("query", texts, size, sizes, space, **options)
        if sizes is not None:
            raise OptionError(f"documents={documents} goes with one size of queries: leave sizes out")
        both = self._wanted(None, [size, documents])
        if both[0].dims < both[1].dims:
            raise OptionError(
                f"documents={documents} is wider than queries of {both[0]}: take queries as wide at least"
            )
        if self.adapter is None and both[0].layers != both[1].layers:
            raise AdapterError(
                f"documents={documents}: without an adapter, queries of {both[0]} are in another space; encode them "
                "at the size of the documents"
            )
        found = self._in_space("query", texts, None, both, space, **options)
        return joined(*(found[each.name] for each in both))

    def encode_document(
        self, texts: Any, size: AnySize | None = None, *, sizes: Iterable[AnySize] | None = None,
        space: str | None = None, batch_size: int = 32, convert_to_tensor: bool = False,
    ) -> Any:  # fmt: skip
        """The vectors of documents, for those of `encode_query`, which has the arguments and errors."""
        options: dict[str, Any] = {"as_tensors": convert_to_tensor, "batch_size": batch_size}
        return self._in_space("passage", texts, size, sizes, space, **options)

    def document_parts(
        self, sizes: Iterable[AnySize]
    ) -> list[tuple[SentenceTransformer, dict[int, Projection], list[Size]]]:
        """What `encode_document` reads sizes from: models, their projections by depth, and the sizes of each.

        Raises:
            LadderError, AdapterError, ExportError: as `encode_document`.
        """
        wanted = self._wanted(None, sizes)
        self._check_space(wanted, None)
        return self._groups(wanted, in_space=True)

    def _in_space(self, use: str, texts: Any, size: Any, sizes: Any, space: str | None, **options: Any) -> Any:
        wanted = self._wanted(size, sizes)
        self._check_space(wanted, space)
        prompt = stored_prompts(self.model)[use]
        found = self._encoded(texts, wanted, in_space=True, prompt=prompt, task=TASKS[use], **options)
        return found[wanted[0].name] if sizes is None else found

    def _check_space(self, wanted: Sequence[Size], space: str | None) -> None:
        if space is not None and space != self.space:
            raise AdapterError(
                f"space={shown(space)}, and this encoder's is {self.space}: vectors of the two cannot be compared; "
                "load the adapter that the index was made with, or make the index anew"
            )
        outside = [each for each in wanted if self.adapter is not None and each.layers not in self.projections]
        if outside:
            raise AdapterError(
                f"{outside[0]} is not in the space of the adapter, which follows another teacher: take a smaller size"
            )

    def _wanted(self, size: Any, sizes: Iterable[Any] | None) -> list[Size]:
        if size is not None and sizes is not None:
            raise OptionError(f"size={size} and sizes={shown(sizes)}: give one of the two")
        return [self._size(each) for each in ([size] if sizes is None else sizes)]

    def _encoded(
        self, texts: Any, wanted: Sequence[Size], *, as_tensors: bool, in_space: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Vectors by the size's name. Sizes that are read from the same layers cost one forward."""
        single, similarity = isinstance(texts, str), Similarity.of(self.model)
        said = [texts] if single else strings_of(texts)
        found: dict[str, Tensor] = {}
        for model, projections, some in self._groups(wanted, in_space):
            pooled = encode(model, said, widths(some), projections=projections, **options)
            found |= {each.name: similarity.finished(pooled[each.layers][:, : each.dims]) for each in some}
        return {
            each.name: (found[each.name] if as_tensors else found[each.name].numpy())[0 if single else slice(None)]
            for each in wanted
        }

    def _groups(
        self, wanted: Iterable[Size], in_space: bool = False
    ) -> list[tuple[SentenceTransformer, dict[int, Projection], list[Size]]]:
        """What each size is read from: a model and its projections. The full size is the stock model as it is."""
        wanted = list(wanted)
        if self._body is None:
            return [(self.model, self.projections, wanted)]
        full = Size(*_shape(Encoder.of(self.model)))
        small = [size for size in wanted if size.layers < full.layers]
        whole = [size for size in wanted if size == full and not in_space]
        narrow = [size for size in wanted if size.layers == full.layers and size not in whole]
        groups = [
            (self._body, self.projections, small),
            (self.model, self.projections, narrow),
            (self.model, {}, whole),
        ]
        return [group for group in groups if group[2]]

    def similarity(self, first: Vectors, second: Vectors) -> Tensor:
        """The model's own similarity of vectors ``[n, d]`` and ``[m, d]`` of one size, ``[n, m]``."""
        return self.model.similarity(first, second)

    def cut(self, size: AnySize) -> SentenceTransformer:
        """A size as a stock SentenceTransformer of its own, in memory; its weights are copies.

        Raises:
            LadderError, ExportError: as `encode`.
        """
        wanted = self._size(size)
        ((model, projections, _),) = self._groups([wanted])
        parts = Encoder.of(model)
        return cut_out(parts, wanted, projection_of(parts, wanted, projections)).to(self.model.device).eval()

    def choose(
        self,
        *,
        quality: float | None = None,
        texts_per_second: float | None = None,
        bytes: int | None = None,
        texts: Sequence[str] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The size that fits a need: the cheapest of that quality, or the best that is quick and small enough.

        Args:
            quality: share of the full size's measured quality, such as 0.97.
            texts_per_second: at least so many on this machine, measured on ``texts``.
            bytes: of a vector, in fp32, at most.
            texts: a hundred or more like those that will be embedded.
            rows: measured; by default what `evaluate` or `agreement` measured last.

        Raises:
            OptionError: nothing is asked for, no size will do, or what is needed was not measured.
        """
        if quality is None and texts_per_second is None and bytes is None:
            raise OptionError("expected quality, texts_per_second or bytes: what should the size be chosen by?")
        quality = None if quality is None else number("quality", quality, above=0)
        bytes = None if bytes is None else whole("bytes", bytes)
        known = self.rows if rows is None else rows
        if quality is not None and not known:
            raise OptionError("quality: nothing was measured yet, call evaluate or agreement first, or give rows")
        speeds = None
        if texts_per_second is not None:
            number("texts_per_second", texts_per_second, above=0)
            if not texts:
                raise OptionError("texts_per_second is measured on texts like yours: give texts")
            speeds = measured_speeds(lambda size: self.encode(list(texts), size), self.sizes, len(texts))
        return chosen_size(
            self.sizes, known, quality=quality, bytes=bytes, speeds=speeds, texts_per_second=texts_per_second
        ).name

    def _size(self, size: Any) -> Size:
        """A size of the model, whether or not it is among `sizes`."""
        parts = Encoder.of(self.model)
        full = Size(parts.depth, parts.dims)
        wanted = full if size is None else Ladder.parse([size]).full
        Ladder({wanted, full}).check(full.layers, full.dims)
        if self.adapter is None or wanted != full:
            projection_of(parts, wanted, self.projections)
        return wanted

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return text("prompt", prompt)
        if name is None:
            return stored_prompts(self.model)["sts"]
        known = served_prompts(self.model)
        if name not in known:
            raise OptionError(f"prompt_name={shown(name)}: the model has {', '.join(known)}")
        return known[name]


def _shape(parts: Encoder) -> tuple[int, int]:
    return parts.depth, parts.dims
