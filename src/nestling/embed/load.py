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

from nestling.embed.files import check_weights
from nestling.embed.hub import find_file
from nestling.errors import LoadError
from nestling.models import ALIASES, locate, quiet
from nestling.records import reason


def load_encoder(name: str | os.PathLike[str], pooling: str | None = None) -> SentenceTransformer:
    """Load a sentence encoder.

    Only safetensors weights are read, in float32, and code that comes with a checkpoint is never run. A folder or an
    alias is loaded without asking any hub. The name that the model carries, into model cards for instance, is ``name``
    itself and not a folder of this machine.

    Args:
        name: the built-in alias ``minilm``, a folder as ``SentenceTransformer.save_pretrained`` writes it, or a hub
            id. An alias wins over a folder of that name; write ``./minilm`` for the folder.
        pooling: ``"mean"``, ``"cls"``, or another that `Pooling` knows, for a folder of transformers' own, which has
            none; such a folder is refused without it. Nothing is changed in one that has modules.

    Returns:
        A stock SentenceTransformer in eval mode, on the GPU where there is one.

    Raises:
        LoadError: there is no such model, it is not a sentence encoder (a Transformer and a Pooling module), its files
            are missing or damaged, weights are missing, or the hub cannot be reached.
    """
    name = os.fspath(name)
    if name in ALIASES and ALIASES[name].suffix == ".gguf":
        raise LoadError(f"{name}: a language model, not a sentence encoder; try minilm")
    source = locate(name)
    if isinstance(source, Path):
        plain = pooling is not None and not (source / "modules.json").exists()
        if not plain or source.is_file():
            _check_folder(name, source)
            check_weights(source)
    with quiet():
        model = _read(name, source, pooling)
    backbone: Any = model[0].model
    backbone.name_or_path = backbone.config.name_or_path = name
    model.model_card_data.base_model = name
    return model.eval()


def _check_folder(name: str, folder: Path) -> None:
    """Refuse what sentence-transformers would take, by putting a mean pooling on top of any language model."""
    if folder.is_file():
        raise LoadError(f"{name}: a GGUF file holds a language model, not a sentence encoder")
    if not (folder / "modules.json").is_file():
        raise LoadError(
            f"{name}: not a sentence encoder, the folder has no modules.json; to make one of a plain transformer, "
            'load it with pooling="mean"'
        )
    try:
        json.loads((folder / "modules.json").read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise LoadError(f"{name}: modules.json is damaged [{reason(error)}]") from error


def _read(name: str, source: Path | str, pooling: str | None) -> SentenceTransformer:
    local, missing = isinstance(source, Path), []
    weights = {"dtype": torch.float32, "use_safetensors": True}
    try:
        _check_dense(name, source)
        if isinstance(source, Path) and pooling is not None and not (source / "modules.json").exists():
            transformer = Transformer(str(source), model_kwargs=weights | {"local_files_only": True})
            pool = Pooling(transformer.get_embedding_dimension(), pooling)
            model = SentenceTransformer(modules=[transformer, pool])
        else:
            model = SentenceTransformer(str(source), local_files_only=local, model_kwargs=weights)
        kinds = [type(module) for module in model]
        if not kinds or kinds[0] is not Transformer or Pooling not in kinds:
            found = ", ".join(kind.__name__ for kind in kinds) or "none"
            raise LoadError(
                f"{name}: not a sentence encoder; expected modules Transformer, Pooling, ..., found {found}"
            )
        backbone: Any = model[0].model
        # Where transformers renames weights, or ties them, names differ: then it reads the file again and reports.
        if backbone.state_dict().keys() - _stored(source, backbone.base_model_prefix):
            _, report = type(backbone).from_pretrained(str(source), output_loading_info=True, **weights)
            missing = sorted(report["missing_keys"])
    except (LoadError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in any way: OSError, KeyError, SafetensorError ...
        raise LoadError(f"{name}: {_advice(local)} [{reason(error)}]") from error
    # Weights that a file lacks are made up at random, which embeds without an error. BERT's pooler, which no pooling
    # reads, goes: made up, it would have every load be another model to whoever compares weights.
    if any(key.startswith("pooler.") for key in missing):
        backbone.pooler = None
    if missing := [key for key in missing if not key.startswith("pooler.")]:
        raise LoadError(f"{name}: the weights lack {len(missing)} tensors of the model, such as {missing[0]}")
    return model


def _check_dense(name: str, source: Path | str) -> None:
    """Stock code would unpickle the weights of a module that has no others."""
    modules = find_file(source, "modules.json")
    for module in json.loads(modules.read_text("utf-8")) if modules is not None else ():
        path = module["path"]
        pickled = module["type"].endswith(".Dense") and find_file(source, f"{path}/model.safetensors") is None
        if pickled:
            raise LoadError(
                f"{name}: {path} has no model.safetensors, and other weights are not read: load the model in "
                "sentence-transformers, if you trust it, and save it again"
            )


def _stored(source: Path | str, prefix: str) -> set[str]:
    """Names of the tensors in the weights' files, without the prefix that a model with a head gives them."""
    whole = find_file(source, "model.safetensors")
    index = None if whole is not None else find_file(source, "model.safetensors.index.json")
    names: list[str] = []
    if whole is not None:
        with safe_open(whole, "pt") as file:
            names = list(file.keys())
    elif index is not None:
        names = list(json.loads(index.read_text("utf-8"))["weight_map"])
    return {name.removeprefix(f"{prefix}.") for name in names}


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
