"""A size as a model of its own: a sentence-transformers folder of stock modules, which any server loads.

The folder holds the first k layers and, as a Dense without activation, the map from the pooled vector to its first d
coordinates (of the start projection, if there is one), then a Normalize. So depth and width are visible to every
runtime, and nobody has to be told to cut anything: ``truncate_dim`` would be read by sentence-transformers alone, and
applied behind the Normalize.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn
from torch.nn.functional import pad

from nestling.embed.export import onnx as graph
from nestling.embed.export.card import card
from nestling.embed.export.compatibility import rewrite
from nestling.embed.export.probe import difference
from nestling.embed.export.tracing import check_installed
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import served_prompts
from nestling.embed.model.folder import write_ladder
from nestling.embed.model.layers import fit_length
from nestling.embed.model.lora import has_adapters, merge
from nestling.embed.model.own import own_projections
from nestling.embed.model.parts import Encoder, truncated_config
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity
from nestling.errors import ExportError, ExportFileError, FileError, OptionError, UnsupportedEncoderError
from nestling.files.folders import write_folder
from nestling.files.reading import reason
from nestling.files.writing import check_folder
from nestling.models import quiet
from nestling.options import flag, path, shown


@dataclass(frozen=True)
class Exported:
    """What was written, and how close it is to the model it was cut from.

    Attributes:
        folder: where.
        cup: its size.
        nbytes: of all files together.
        difference: largest difference of a coordinate to the taps', over probe texts; in parts of the largest
            coordinate, where lengths count and that is above 1.
        onnx_difference: of the ONNX graph to the exported model, likewise; None without one.
        int8_cosine: mean cosine of the int8 graph's vectors to those in fp32; None without one.
    """

    folder: Path
    cup: Size
    nbytes: int
    difference: float
    onnx_difference: float | None = None
    int8_cosine: float | None = None


def export(
    model: nn.Module,
    cup: Size | str | tuple[int, int],
    folder: str | Path,
    *,
    ladder: Ladder | str | Iterable[Any] | None = None,
    projections: Mapping[int, Projection] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    onnx: bool = False,
    int8: bool = False,
) -> Exported:
    """Write a size of an encoder as a standalone model.

    The folder appears complete or not at all. Before that it is loaded as a stranger would load it, and must give the
    vectors of the taps within 1e-5, with each of the model's prompts by the stock methods that use them, and without
    one; the ONNX graph must give those of the folder within 1e-4.

    Vectors are compared as the model compares its own: where that is by cosine they are unit vectors, and where
    lengths count (``similarity_fn_name`` dot, euclidean or manhattan, and no Normalize at the end) they keep them. A
    ``truncate_dim`` of the model is its width. Adapters (LoRA) are merged into the weights.

    Args:
        model: a SentenceTransformer in fp32; it is not changed.
        cup: the size, such as ``"6x128"``.
        folder: must not exist yet.
        ladder: the sizes that the model was trained for, as `Ladder.parse` takes them, kept in ``nestling.json``.
            Those of this depth that are not wider are declared as widths that a server may cut to. By default the
            size alone.
        projections: by depth, those that the model was trained with (``Trained.projections``, `load_projections`). By
            default those that it remembers, from its training or from its folder; ``{}`` for none.
        rows: measured rows (`GridEvaluator.rows`) for the model card; those of the size are shown.
        onnx: also write ``onnx/model.onnx``: ids and mask to embeddings, any batch and length.
        int8: also write ``onnx/model_int8.onnx``, with weights quantised, and under the name
            ``onnx/model_quantized.onnx``, by which transformers.js asks for it; needs ``onnx``.

    Raises:
        ExportFileError: the folder cannot be made or written to, or the disk is full.
        ExportError: the folder exists, weights are not fp32, ``int8`` without ``onnx``, a package is missing, the
            projection is of another width, there are some but none for a depth below the model's, an adapter cannot be
            merged, a graph cannot leave prompts out of the pooling as the model does, or the result does not give the
            same vectors: those of int8 weights must have a mean cosine of 0.9.
        LadderError: the model does not have that size, or one of the ladder's.
        UnsupportedEncoderError: the model has no layers to cut.
    """
    folder, onnx, int8 = path("folder", folder), flag("onnx", onnx), flag("int8", int8)
    encoder = Encoder.of(model)
    size = Ladder.parse([cup]).full
    if projections is not None and not isinstance(projections, Mapping):
        raise OptionError(
            f"projections={shown(projections)}: expected projections by depth, as load_projections gives them"
        )
    ladder = Ladder([size]) if ladder is None else Ladder.parse(ladder)
    projection = projection_of(encoder, size, own_projections(model) if projections is None else projections)
    Similarity.of(encoder.model)
    _check(encoder, size, ladder, folder, projection)
    if int8 and not onnx:
        raise ExportError("int8 is made of the ONNX graph: ask for onnx as well")
    if onnx:
        check_installed()
        graph.check_prompts(encoder.model, encoder.model.prompts.values())

    def fill(new: Path) -> Exported:
        with quiet():
            _write(encoder, size, new, ladder, projection)
            served = _loaded(new, str(encoder.model.device))
            differs = difference(encoder, size, projection, served)
            measured = graph.write(served.cpu(), new / "onnx", int8) if onnx else (None, None)
        (new / "README.md").write_text(card(encoder.model, served, size, ladder, rows, onnx), "utf-8")
        nbytes = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        _check_new(folder)  # made by somebody else meanwhile; it would be replaced without a word
        return Exported(folder, size, nbytes, differs, *measured)

    try:
        return write_folder(folder, fill)
    except FileError as error:
        raise ExportFileError(str(error)) from error


def _check(encoder: Encoder, size: Size, ladder: Ladder, folder: Path, projection: Projection | None) -> None:
    Ladder({size, *ladder, Size(encoder.depth, encoder.dims)}).check(encoder.depth, encoder.dims)
    _check_new(folder)
    check_fp32(encoder.model)
    if projection is not None and projection.encode.shape[0] != encoder.dims:
        raise ExportError(f"the projection is of width {projection.encode.shape[0]}, the embeddings of {encoder.dims}")


def check_fp32(model: nn.Module) -> None:
    """Raises ExportError unless all weights are fp32."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ExportError(f"the weights are {found}: load the model in float32, its vectors are compared to 1e-5")


def projection_of(encoder: Encoder, size: Size, projections: Mapping[int, Projection]) -> Projection | None:
    """The one of the size's depth. The full model's may have none.

    Raises:
        ExportError: there are some, but none for that depth.
    """
    if projections and size.layers not in projections and size.layers < encoder.depth:
        raise ExportError(
            f"there is no projection for {size}, only for layers {sorted(projections)}: choose a size of those"
        )
    return projections.get(size.layers)


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ExportError(f"{folder} exists: choose another folder, or remove it")
    try:
        check_folder(folder)
    except FileError as error:
        raise ExportFileError(str(error)) from error


def cut_out(encoder: Encoder, size: Size, projection: Projection | None) -> SentenceTransformer:
    """A size as a model of stock modules, whose weights are copies, on the CPU.

    Raises:
        ExportError: an adapter (LoRA) cannot be merged.
    """
    transformer = copy.deepcopy(encoder.shortened(size.layers)).cpu()
    if has_adapters(transformer):
        try:
            merge(transformer)
        except UnsupportedEncoderError as error:
            raise ExportError(str(error)) from error
    fit_length(transformer)
    backbone: Any = transformer.model
    backbone.config = truncated_config(encoder.transformer.model.config, size.layers)
    backbone.config.output_hidden_states = False
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # BERT's, which no pooling of sentence-transformers reads
    head = [copy.deepcopy(module).cpu() for module in encoder.head]
    similarity = Similarity.of(encoder.model)
    return SentenceTransformer(
        modules=[transformer, *_narrowed(head, encoder, size.dims, projection), *[Normalize()] * similarity.unit],
        prompts=served_prompts(encoder.model),
        default_prompt_name=encoder.model.default_prompt_name,
        similarity_fn_name=similarity.name,  # type: ignore[arg-type]
        device="cpu",
    )


def _write(encoder: Encoder, size: Size, folder: Path, ladder: Ladder, projection: Projection | None) -> None:
    small = cut_out(encoder, size, projection)
    small.save_pretrained(str(folder), create_model_card=False)
    dims = [c.dims for c in ladder if c.layers == size.layers and c.dims <= size.dims] + [size.dims]
    rewrite(folder, small, dims)
    space = {} if projection is None or projection.space is None else {"space": projection.space}
    write_ladder(folder, ladder.to_json() | {"cup": size.name, "projected": projection is not None, **space})


def _loaded(folder: Path, device: str) -> SentenceTransformer:
    try:
        return SentenceTransformer(str(folder), device=device, local_files_only=True)
    except Exception as error:  # transformers 5.16, for one, cannot read back a ModernBERT with a single layer
        raise ExportError(f"the export cannot be loaded again [{reason(error)}]") from error


def _narrowed(head: list[nn.Module], encoder: Encoder, dims: int, projection: Projection | None) -> list[nn.Module]:
    """The head with a linear map to the first ``dims`` coordinates behind it; linear maps in a row become one."""
    if projection is None and dims == encoder.width:
        return head
    weight, bias = torch.eye(dims, encoder.width), None
    if projection is not None:  # of the coordinates that the model keeps
        weight = pad(projection.weight(dims).cpu(), (0, encoder.width - encoder.dims))
        bias = projection.bias(dims)
    while isinstance(head[-1], Dense) and _is_linear(head[-1]):
        inner: Any = head.pop().linear
        if inner.bias is not None:
            bias = weight @ inner.bias.detach() + (0 if bias is None else bias.cpu())
        weight = weight @ inner.weight.detach()
    narrow = Dense(weight.shape[1], dims, bias=bias is not None, activation_function=None)
    _fill(narrow.linear, weight, bias)
    return [*head, narrow]


def _is_linear(dense: Dense) -> bool:
    names = {dense.module_input_name, dense.module_output_name}
    plain = isinstance(dense.activation_function, nn.Identity) and not dense.use_residual
    return plain and names == {"sentence_embedding"}


@torch.no_grad()
def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
