"""Adapters of PEFT in an encoder, merged into its weights: what is written loads everywhere, without PEFT."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from nestling.errors import MissingExtraError, TrainingError, UnsupportedEncoderError
from nestling.files.writing import naming

TRAINED_FILE = "trained.safetensors"  # of a checkpoint of a model with adapters


def has_adapters(transformer: Transformer) -> bool:
    """Whether the model inside has adapters, its own or PEFT's wrapper around it."""
    return bool(getattr(transformer.model, "peft_config", None))


def merged(model: SentenceTransformer) -> SentenceTransformer:
    """The model with its adapters merged into its weights: a deep copy, or the model itself if it has none.

    Raises:
        UnsupportedEncoderError: the adapters are of a kind that weights cannot take up, such as prompts.
    """
    if not isinstance(model[0], Transformer) or not has_adapters(model[0]):
        return model
    copied = copy.deepcopy(model)
    merge(copied[0])  # type: ignore[arg-type]
    return copied


def merge(transformer: Transformer) -> None:
    """Merge the adapters of a transformer, in place; those that are switched off are left out.

    Raises:
        UnsupportedEncoderError: as `merged`.
        MissingExtraError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("the model has adapters, which need peft: pip install 'nestling[train]'")
    from peft import PeftModel

    backbone: Any = transformer.model
    kinds = {
        str(getattr(config, "peft_type", "of PEFT")).rpartition(".")[2] for config in backbone.peft_config.values()
    }
    try:
        if isinstance(backbone, PeftModel):
            transformer.model = backbone.merge_and_unload()
        else:
            _unload(backbone)
            del backbone.peft_config
            backbone._hf_peft_config_loaded = False
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise UnsupportedEncoderError(
            f"the model has an adapter ({', '.join(sorted(kinds))}) that cannot be merged into its weights: {error}"
        ) from error


def save_trained(model: SentenceTransformer, path: Path) -> None:
    """Write the trained tensors of a model with adapters under the model's own names: PEFT's need the base model.

    Raises:
        FileError: it cannot be written.
    """
    changing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers()}
    tensors = {
        name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items() if name in changing
    }
    with naming(path):
        save_file(tensors, path)


def load_trained(model: SentenceTransformer, path: Path) -> None:
    """Put back what `save_trained` wrote.

    Raises:
        TrainingError: it is damaged, or of another model.
    """
    try:
        tensors = load_file(path)
        unknown = sorted(tensors.keys() - model.state_dict().keys())
        if unknown:
            raise ValueError(f"the model has no {unknown[0]}")
        model.load_state_dict(tensors, strict=False)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise TrainingError(f"{path} cannot be put back ({error}): go on from an earlier checkpoint") from error


def _unload(backbone: Any) -> None:
    """Put plain layers, with what their adapters add, where layers with adapters are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        raise ValueError("it has no layers of its own")
    for name, module in layers.items():
        if not module.disable_adapters:
            module.merge()
        path, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(path), last, module.get_base_layer())
