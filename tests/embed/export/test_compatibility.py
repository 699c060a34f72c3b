"""The exported files under the rules of other servers' parsers, each written out here from what they read.

Sources: text-embeddings-inference 1.9.3 (router/src/lib.rs, backends/src/lib.rs, candle/src/models/dense.rs), vLLM
(transformers_utils/config.py, model_executor/models/adapters.py), fastembed 0.9 (common/preprocessor_utils.py), and
sentence-transformers 3 to 5.3, whose modules take no keyword that they do not know.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sklearn.preprocessing import normalize

from nestling.embed.export.compatibility import longest, rewrite
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder

from ..families import sentence_model, some_texts

LEGACY = {f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
CASES = [("bert", "mean"), ("xlm-roberta", "cls"), ("modernbert", "mean"), ("qwen3", "lasttoken"), ("gemma3", "mean")]


@pytest.fixture(params=CASES, ids="-".join)
def served(request, backbones, tmp_path):
    """``folder, pooling`` of an exported cup."""
    family, pooling = request.param
    ladder = Ladder.parse("2x4,2x8,4x32")
    model = sentence_model(backbones(family), pooling)
    model.prompts = {"query": "w11 ", "document": None}
    return export(model, "2x8", tmp_path / "cup", ladder=ladder).folder, pooling


def read(folder, *path):
    return json.loads(folder.joinpath(*path).read_text("utf-8"))


# Fields without a default of a model's config, besides those that all have (candle/src/models/*.rs).
NEEDED = {
    "bert": ("hidden_act", "hidden_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    "mpnet": ("hidden_act", "relative_attention_num_buckets", "attention_probs_dropout_prob", "layer_norm_eps"),
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "activation"),
    "modernbert": (
        "hidden_activation", "initializer_cutoff_factor", "norm_eps", "norm_bias", "eos_token_id", "bos_token_id",
        "cls_token_id", "sep_token_id", "global_rope_theta", "local_rope_theta", "attention_bias", "attention_dropout",
        "global_attn_every_n_layers", "local_attention", "classifier_activation",
    ),
    "qwen3": ("attention_bias", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "eos_token_id",
              "use_sliding_window"),
    "gemma3": ("attention_bias", "hidden_activation", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps",
               "rope_local_base_freq", "rope_theta", "_sliding_window_pattern", "use_bidirectional_attention"),
}  # fmt: skip
NEEDED["xlm-roberta"] = NEEDED["roberta"] = NEEDED["bert"]


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def test_text_embeddings_inference(served):
    folder, pooling = served
    config = read(folder, "config.json")
    assert isinstance(config["architectures"], list) and isinstance(config["model_type"], str)
    assert is_count(config["max_position_embeddings"]) and is_count(config["pad_token_id"])
    pool = read(folder, "1_Pooling", "config.json")  # the folder's name is fixed there
    flags = ["pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"]
    assert all(isinstance(pool[flag], bool) for flag in flags)  # no defaults for the first two
    first = next(flag for flag in flags if pool[flag])  # tried in that order
    assert first == {"cls": flags[0], "mean": flags[1], "lasttoken": flags[2]}[pooling]
    assert is_count(read(folder, "sentence_bert_config.json")["max_seq_length"])
    prompts = read(folder, "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "w11 ", "document": ""}  # a null would be a parse error
    modules = read(folder, "modules.json")
    assert {module["type"] for module in modules} == LEGACY  # one unknown type, and no Dense is loaded
    assert all(is_count(m["idx"]) and isinstance(m["name"], str) and isinstance(m["path"], str) for m in modules)
    (dense,) = [module["path"] for module in modules if module["type"].endswith("Dense")]
    config = read(folder, dense, "config.json")
    assert is_count(config["in_features"]) and is_count(config["out_features"]) and isinstance(config["bias"], bool)
    assert config["activation_function"] == "torch.nn.modules.linear.Identity"  # Tanh is the only other one
    weights = load_file(folder / dense / "model.safetensors")
    assert weights["linear.weight"].shape == (config["out_features"], config["in_features"])
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", NEEDED)
def test_configs_that_text_embeddings_inference_parses(backbones, tmp_path, family):
    config = read(export(sentence_model(backbones(family)), "2x8", tmp_path / "cup").folder, "config.json")
    sizes = () if family == "distilbert" else ("hidden_size", "intermediate_size", "num_attention_heads")
    assert {*NEEDED[family], *sizes, "vocab_size", "max_position_embeddings"} <= set(config)
    rope = config.get("rope_parameters")
    assert rope is None or set(rope) == {"rope_theta", "rope_type"}  # one kind of layers, or a parse error


@pytest.mark.parametrize("family", ["modernbert", "gemma3", "qwen3", "eurobert", "nomic-bert"])
def test_rotary_bases_survive_under_their_old_names(backbones, tmp_path, family):
    source = shutil.copytree(backbones(family), tmp_path / "source")
    config = read(source, "config.json")
    kinds = [part for part in config["rope_parameters"].values() if isinstance(part, dict)]
    for number, part in enumerate(kinds or [config["rope_parameters"]]):
        part["rope_theta"] = 3.0 + number  # far from any default
    (source / "config.json").write_text(json.dumps(config))
    model, texts = sentence_model(source), some_texts(9)
    folder = export(model, "4x32", tmp_path / "cup").folder  # it checks the vectors as well
    np.testing.assert_allclose(
        SentenceTransformer(str(folder), device="cpu").encode(texts), normalize(model.encode(texts)), atol=1e-5
    )
    old = read(folder, "config.json")
    names = {"modernbert": ("global_rope_theta", "local_rope_theta"), "gemma3": ("rope_theta", "rope_local_base_freq")}
    assert sorted(old[name] for name in names.get(family, ("rope_theta",))) == [3.0, 4.0][: max(1, len(kinds))]


def test_scaled_rotary_embeddings_are_left_alone(backbones, tmp_path):
    source = shutil.copytree(backbones("qwen3"), tmp_path / "source")
    config = read(source, "config.json")
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    (source / "config.json").write_text(json.dumps(config))
    stored = read(export(sentence_model(source), "2x8", tmp_path / "cup").folder, "config.json")
    assert stored["rope_parameters"] == config["rope_parameters"] and "rope_theta" not in stored


def test_vllm(served):
    folder, pooling = served
    modules = read(folder, "modules.json")
    (pool,) = [module for module in modules if module["type"] == "sentence_transformers.models.Pooling"]
    found = set()
    for key, value in read(folder, pool["path"], "config.json").items():
        name = value if key == "pooling_mode" and isinstance(value, str) else key if value is True else None
        if name is not None:
            kind = name.replace("pooling_mode_", "").split("_", 1)[0]
            found.add("LAST" if "lasttoken" in kind else kind.upper())
    assert found - {"INCLUDE"} == {{"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}[pooling]}
    assert any(module["type"] == "sentence_transformers.models.Normalize" for module in modules)
    dense = [module for module in modules if module["type"] == "sentence_transformers.models.Dense"]
    assert len(dense) == 1  # only the first is used
    config = read(folder, dense[0]["path"], "config.json")
    assert config["activation_function"].startswith("torch.nn.modules.")
    assert set(load_file(folder / dense[0]["path"] / "model.safetensors")) == {"linear.weight"}
    assert {"max_seq_length", "do_lower_case"} <= set(read(folder, "sentence_bert_config.json"))
    config = read(folder, "config.json")
    assert config["is_matryoshka"] is True and config["matryoshka_dimensions"] == [4, 8]


def test_fastembed(served):
    folder, _ = served
    tokens, config = read(folder, "special_tokens_map.json"), read(folder, "tokenizer_config.json")
    positions = (
        63 if "roberta" in read(folder, "config.json")["model_type"] else 64
    )  # behind the padding token's number
    assert tokens and all(isinstance(token, str) for token in tokens.values())
    lengths = [config[key] for key in ("max_length", "model_max_length") if key in config]
    assert min(lengths) == longest(SentenceTransformer(str(folder), device="cpu")) == positions
    assert isinstance(config["pad_token"], str) and is_count(read(folder, "config.json")["pad_token_id"])
    assert (folder / "tokenizer.json").is_file()


def test_older_sentence_transformers(served):
    folder, _ = served
    tokens = read(folder, "tokenizer_config.json")  # its class is unknown to transformers 4 under its new name
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokens["model_input_names"] == ["input_ids", "attention_mask"]  # else it makes token types as well
    old = {"word_embedding_dimension", "pooling_mode", "include_prompt"}
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    old |= {f"pooling_mode_{name}" for name in flags}
    assert set(read(folder, "1_Pooling", "config.json")) == old
    assert set(read(folder, "2_Dense", "config.json")) == {
        "in_features",
        "out_features",
        "bias",
        "activation_function",
    }
    known = {"max_seq_length", "do_lower_case", "model_args"}
    assert set(read(folder, "sentence_bert_config.json")) <= known


def test_tokenizers_without_a_limit_and_stale_ones(backbones, tmp_path):
    model = sentence_model(backbones("modernbert"))
    model.tokenizer.model_max_length = 10**30
    folder = export(model, "2x8", tmp_path / "endless").folder
    assert "max_seq_length" not in read(folder, "sentence_bert_config.json")
    model = sentence_model(backbones("bert"))
    model.tokenizer.model_max_length = 10**30
    folder = export(model, "2x8", tmp_path / "positions").folder
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == 64
    model.max_seq_length = 16
    model.tokenizer.init_kwargs["max_length"] = 8  # as all-MiniLM-L6-v2 has it: half of what the model reads
    folder = export(model, "2x8", tmp_path / "cup").folder
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == 16
    config = read(folder, "tokenizer_config.json")
    assert config["model_max_length"] == 16 and "max_length" not in config
    assert SentenceTransformer(str(folder), device="cpu").max_seq_length == 16


def test_settings_that_only_new_releases_know_are_kept(backbones, tmp_path):
    model = sentence_model(backbones("bert"))
    model[0].processing_kwargs = {"text": {"max_length": 5, "truncation": True}}
    folder = export(model, "2x8", tmp_path / "cup").folder
    assert read(folder, "sentence_bert_config.json")["processing_kwargs"] == model[0].processing_kwargs
    model[0].processing_kwargs = {}
    message = {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"}
    model[0].modality_config = model[0].modality_config | {"message": message}
    model.save_pretrained(str(tmp_path / "chat"))
    rewrite(tmp_path / "chat", model, [8])
    assert "message" in read(tmp_path / "chat", "sentence_bert_config.json")["modality_config"]
