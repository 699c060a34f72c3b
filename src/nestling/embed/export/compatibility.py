"""The files of a sentence-transformers folder, rewritten so that other servers read them too.

sentence-transformers 6 saves new names for its modules and for the ways of pooling, which it reads back itself, and
which text-embeddings-inference (to 1.9.3), vLLM (before August 2026) and its own releases before 5.4 do not: a folder
as saved has no pooling for them, or no Dense. Everything is written here under the names that all of them read. What
each reads:

* text-embeddings-inference: module types ``sentence_transformers.models.{Transformer,Pooling,Dense,Normalize}`` and no
  others, booleans ``pooling_mode_{cls,mean}_tokens``, all four keys of a Dense, ``max_seq_length`` as an integer where
  there is a ``sentence_bert_config.json``, prompts that are texts, ``architectures`` and ``max_position_embeddings``,
  and rotary bases outside of ``rope_parameters`` where there are two of them (it does not know NomicBERT as
  transformers 5 saves it, EuroBERT and T5);
* vLLM: the same types, ``pooling_mode`` or a boolean that is true, ``max_seq_length`` only beside ``do_lower_case``,
  and ``matryoshka_dimensions``, without which a request that names its dimensions is refused, even the right ones;
* transformers 4, which some of them run on: rotary bases outside of ``rope_parameters``, else it takes its defaults,
  and the old name of tokenizers without a class of their own;
* fastembed: ``special_tokens_map.json``, and the smaller of a tokenizer's ``max_length`` and ``model_max_length``.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

LEGACY = "sentence_transformers.models."
POOLING = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
DENSE = ("in_features", "out_features", "bias", "activation_function")
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
TWO_BASES = {  # rotary bases of models with two kinds of layers, under their old names
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
}
ENDLESS = 1 << 30  # transformers gives tokenizers without a limit an astronomic one


def rewrite(folder: Path, model: SentenceTransformer, dims: Iterable[int]) -> None:
    """Rewrite the files of a folder that ``model.save_pretrained`` has just written.

    Args:
        dims: widths at which the embedding may be cut by a server that is asked to, the full one among them.
    """
    modules = read(folder / "modules.json")
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = LEGACY + kind
        if kind == "Pooling":
            path = folder / module["path"] / "config.json"
            write(path, _pooling(read(path)))
        if kind == "Dense":
            path = folder / module["path"] / "config.json"
            write(path, _dense(read(path)))
    write(folder / "modules.json", modules)
    path = folder / "config.json"
    write(path, _rope(read(path)) | {"is_matryoshka": True, "matryoshka_dimensions": sorted(set(dims))})
    path = folder / "config_sentence_transformers.json"
    settings = read(path)
    settings["prompts"] = {name: prompt or "" for name, prompt in settings.get("prompts", {}).items()}  # never null
    write(path, settings)
    _transformer(folder, model)
    _tokenizer(folder, model)


def longest(model: SentenceTransformer) -> int | None:
    """The most tokens of a text that the model reads, if it has such a limit."""
    length = model.max_seq_length
    return int(length) if length is not None and length < ENDLESS else None


def inputs(model: SentenceTransformer) -> list[str]:
    """What the model needs of what its tokenizer makes: ids, mask, and types of tokens unless all of them are 0."""
    typed = any(model.tokenizer("a text").get("token_type_ids", ()))
    return [name for name in model.tokenizer.model_input_names if name != "token_type_ids" or typed]


def read(path: Path) -> Any:
    """The value of a JSON file of ours."""
    return json.loads(path.read_text("utf-8"))


def write(path: Path, value: Any) -> None:
    """Write a value as JSON, as sentence-transformers indents it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _pooling(config: dict[str, Any]) -> dict[str, Any]:
    modes = config["pooling_mode"]
    chosen = [modes] if isinstance(modes, str) else modes
    names = {"pooling_mode": modes} if isinstance(modes, str) else {}  # old releases take one name, or booleans
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **names,
        **{f"pooling_mode_{key}": mode in chosen for mode, key in POOLING.items()},
        "include_prompt": config["include_prompt"],
    }


def _dense(config: dict[str, Any]) -> dict[str, Any]:
    """The four keys that everybody reads; others are kept where they are not what they are by default."""
    stock = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    return {key: value for key, value in config.items() if key in DENSE or value != stock.get(key, False)}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config with its rotary bases where they were before transformers 5, which reads both places.

    Scaled variants are left as they are: they have more to them than a base.
    """
    rope = config.get("rope_parameters") or {}
    names = TWO_BASES.get(config["model_type"])
    if names is None:
        flat = rope.get("rope_type") == "default" and "rope_theta" in rope
        return config | ({"rope_theta": rope["rope_theta"]} if flat else {})
    if any(rope.get(kind, {}).get("rope_type") != "default" for kind in names):
        return config
    kept = {key: value for key, value in config.items() if key != "rope_parameters"}
    return kept | {name: rope[kind]["rope_theta"] for kind, name in names.items()}


def _transformer(folder: Path, model: SentenceTransformer) -> None:
    """``sentence_bert_config.json`` as before 5.4, which newer releases read as well, with what else is set."""
    path = folder / "sentence_bert_config.json"
    config = read(path)
    if config.get("modality_config") == TEXT_ONLY and config.get("transformer_task") == "feature-extraction":
        for key in ("modality_config", "transformer_task", "module_output_name"):
            config.pop(key, None)
    limit = {} if longest(model) is None else {"max_seq_length": longest(model)}
    # Without its pooler a BERT is loaded with a warning that weights are missing, unless it is told to have none.
    backbone = model[0].model
    if getattr(backbone, "pooler", True) is None:
        config["model_args"] = {"add_pooling_layer": False}
    # Lower-casing, where a model asks for it, has become part of its tokenizer by now.
    write(path, {**limit, "do_lower_case": False, **config})


def _tokenizer(folder: Path, model: SentenceTransformer) -> None:
    path = folder / "tokenizer_config.json"
    config = {
        key: value for key, value in read(path).items() if key not in ("max_length", "local_files_only", "is_local")
    }
    if (limit := longest(model)) is not None:
        config["model_max_length"] = limit
    config["model_input_names"] = inputs(model)  # whose default has changed
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name until transformers 5, which still knows it
    write(path, config)
    write(folder / "special_tokens_map.json", {k: str(v) for k, v in model.tokenizer.special_tokens_map.items()})
