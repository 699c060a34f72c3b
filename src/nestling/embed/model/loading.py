"""Loading sentence encoders, from the same kinds of source as language models: an alias, a folder, a hub id."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from nestling.embed.model.folder import LADDER_FILE, check_weights, load_projections
from nestling.embed.model.hub import find_file
from nestling.embed.model.layers import fit_length
from nestling.embed.model.layout import adapter_folder, layout_of
from nestling.embed.model.lora import merge
from nestling.embed.model.own import remember
from nestling.embed.model.projection import Projection
from nestling.errors import LoadError, UnreachableError
from nestling.files.models import check_model_folder
from nestling.files.reading import is_failure, reason
from nestling.models import ALIASES, locate, quiet


def load_encoder(name: str | os.PathLike[str], pooling: str | None = None) -> SentenceTransformer:
    """Load a sentence encoder.

    Only safetensors weights are read, in float32, and code that comes with a checkpoint is never run. A folder or an
    alias is loaded without asking any hub, but for the base model of an adapter (LoRA), which is merged into it. The
    name that the model carries, into model cards for instance, is ``name`` itself and not a folder of this machine. It
    also carries the projections that its sizes were trained with, if there are any, for exports and measurements.
    Texts are cut to the positions that the model has, if it was saved with a greater length.

    Args:
        name: the built-in alias ``minilm``, a folder as ``SentenceTransformer.save_pretrained`` writes it, in any
            release, or a hub id. An alias wins over a folder of that name; write ``./minilm`` for the folder.
        pooling: ``"mean"``, ``"cls"``, or another that `Pooling` knows, for a folder of transformers' own, which has
            none; such a folder is refused without it. Nothing is changed in one that has modules.

    Returns:
        A stock SentenceTransformer in eval mode, on the GPU where there is one.

    Raises:
        LoadError: there is no such model, it is not a sentence encoder with layers (a Transformer and a Pooling
            module), its files are missing or damaged, weights are missing, or the hub cannot be reached.
        LadderError: what nestling wrote beside the model is damaged.
    """
    name = os.fspath(name)
    if name in ALIASES and ALIASES[name].suffix == ".gguf":
        raise LoadError(f"{name}: a language model, not a sentence encoder; try minilm")
    source = _located(name)
    if isinstance(source, Path):
        _check_folder(name, source, pooling)
        check_weights(source)
    with quiet():
        model = _read(name, source, pooling)
    backbone: Any = model[0].model
    backbone.name_or_path = backbone.config.name_or_path = name
    model.model_card_data.base_model = name
    fit_length(model[0])  # type: ignore[arg-type]
    remember(model, _projections(source))
    return model.eval()


def _located(name: str) -> Path | str:
    """As `locate`, but for folders whose transformer is in a folder of its own."""
    if name not in ALIASES and name.strip() and "\0" not in name and os.path.isdir(os.path.expanduser(name)):
        return Path(os.path.expanduser(name))
    return locate(name)


def _check_folder(name: str, folder: Path, pooling: str | None) -> None:
    """Refuse what sentence-transformers would take, by putting a mean pooling on top of any language model."""
    if folder.is_file():
        raise LoadError(f"{name}: a GGUF file holds a language model, not a sentence encoder")
    if (folder / "modules.json").exists():
        return
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise LoadError(
            f"{name}: the folder has neither modules.json nor config.json; expected one written by save_pretrained"
        )
    if pooling is None:
        raise LoadError(
            f"{name}: not a sentence encoder, the folder has no modules.json; to make one of a plain transformer, "
            'load it with pooling="mean"'
        )


def _read(name: str, source: Path | str, pooling: str | None) -> SentenceTransformer:
    local, layout = isinstance(source, Path), None
    try:
        if isinstance(source, Path):
            check_model_folder(source)
        layout = layout_of(name, source)
        with adapter_folder(source, layout, _located) as folder:
            model = _loaded(folder, local and layout.base is None, pooling if layout.plain else None)
        _check_kinds(name, model)
        # What a wrong setting breaks is found now, not in a long job: of texts of two lengths, one is padded.
        model.encode(["a", "a a a"], show_progress_bar=False)
        if layout.base is None:
            missing = _missing(model, source, layout.transformer)
        else:
            merge(model[0])  # type: ignore[arg-type]
            missing = _missing(model, _located(layout.base), "")
    except LoadError:
        raise
    except BaseException as error:  # damaged files fail in any way: OSError, KeyError, SafetensorError ...
        if not is_failure(error):
            raise
        base = None if layout is None else layout.base
        advice = _advice(local) if base is None else f"an adapter for {base}, and they cannot be loaded together"
        raise LoadError(f"{name}: {advice} [{reason(error)}]") from error
    # Weights that a file lacks are made up at random, which embeds without an error. BERT's pooler, which no pooling
    # reads, goes: made up, it would have every load be another model to whoever compares weights.
    if any(key.startswith("pooler.") for key in missing):
        backbone: Any = model[0].model
        backbone.pooler = None
    if missing := [key for key in missing if not key.startswith("pooler.")]:
        raise LoadError(f"{name}: the weights lack {len(missing)} tensors of the model, such as {missing[0]}")
    return model


def _loaded(source: Path | str, local: bool, pooling: str | None) -> SentenceTransformer:
    """By stock code, in fp32; with a pooling on top of a plain transformer."""
    weights = {"dtype": torch.float32, "use_safetensors": True}
    if pooling is None:
        return SentenceTransformer(str(source), local_files_only=local, model_kwargs=weights)
    safe = {"local_files_only": local, "trust_remote_code": False}
    transformer = Transformer(
        str(source), model_kwargs=weights | safe, config_kwargs=dict(safe), processor_kwargs=dict(safe)
    )
    pool = Pooling(transformer.get_embedding_dimension(), pooling)
    return SentenceTransformer(modules=[transformer, pool])


def _check_kinds(name: str, model: SentenceTransformer) -> None:
    kinds = [type(module) for module in model]
    first: Any = next(iter(model), None)
    if type(first) is Transformer and first.module_output_name != "token_embeddings":
        kind = first.model.config.model_type
        raise LoadError(f"{name}: a {kind} model gives vectors of whole inputs by itself: it has no layers to cut")
    if not kinds or kinds[0] is not Transformer or Pooling not in kinds:
        found = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise LoadError(f"{name}: not a sentence encoder; expected modules Transformer, Pooling, ..., found {found}")


def _missing(model: SentenceTransformer, source: Path | str, folder: str) -> list[str]:
    """Names of the model's tensors that its files lack.

    Where transformers renames weights, or ties them, names differ: then it reads the files again and reports.
    """
    backbone: Any = model[0].model
    if not backbone.state_dict().keys() - _stored(source, folder, backbone.base_model_prefix):
        return []
    weights = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": isinstance(source, Path)}
    _, report = type(backbone).from_pretrained(str(source), subfolder=folder, output_loading_info=True, **weights)
    return sorted(report["missing_keys"])


def _stored(source: Path | str, folder: str, prefix: str) -> set[str]:
    """Names of the tensors in the weights' files, without the prefix that a model with a head gives them."""
    whole = find_file(source, os.path.join(folder, "model.safetensors"))
    index = None if whole is not None else find_file(source, os.path.join(folder, "model.safetensors.index.json"))
    names: list[str] = []
    if whole is not None:
        with safe_open(whole, "pt") as file:
            names = list(file.keys())
    elif index is not None:
        names = list(json.loads(index.read_text("utf-8"))["weight_map"])
    return {name.removeprefix(f"{prefix}.") for name in names}


def _projections(source: Path | str) -> dict[int, Projection]:
    """Those of the folder; none where a hub cannot be asked and there is no ``nestling.json`` in its cache."""
    try:
        return load_projections(source) if find_file(source, LADDER_FILE) is not None else {}
    except UnreachableError:
        return {}


def _advice(local: bool) -> str:
    if local:
        return (
            "the folder cannot be loaded; expected modules.json with stock modules, config.json, safetensors weights "
            "and a tokenizer, all complete"
        )
    return (
        "no folder has that name, and it cannot be loaded from the hub; check the spelling, the network, "
        "HF_HUB_OFFLINE, that you may access it, and that it is a sentence encoder with safetensors weights"
    )
