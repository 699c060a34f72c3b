"""Writes a model of the llama family into a GGUF file, so that llama.cpp runs the very same weights.

There is no tokenizer in it: ids go in, logits come out. Weights are fp32, as nestling computes on a CPU.
"""

from pathlib import Path

import gguf
import typer
from torch import Tensor
from transformers import PreTrainedModel

LAYER = {  # of a layer: names here and there
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROTATED = ("attn_q", "attn_k")


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows ``[heads * D, N]`` in the order of a rope that turns coordinates 2i and 2i + 1, where transformers' turns i
    and i + D/2. Products of queries and keys stay as they are."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def check(config) -> None:
    """Refuse what would be computed in another way."""
    rope, kind = config.rope_parameters["rope_type"], config.model_type
    if kind != "llama" or rope != "default" or config.attention_bias or config.mlp_bias:
        raise typer.BadParameter(
            f"the model is a {kind} with a rope of type {rope}: expected a llama with a default rope and no biases"
        )


def write_gguf(lm: PreTrainedModel, path: Path) -> None:
    """The weights and sizes of ``lm``, in fp32."""
    config = lm.config
    check(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for name, weight in lm.state_dict().items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            number, _, part = module.removeprefix("model.layers.").partition(".")
            place = LAYER[part]
            name = f"blk.{number}.{place}"
            weight = neighbours(weight, heads[place]) if place in ROTATED else weight
        elif module == "lm_head" and config.tie_word_embeddings:
            continue
        else:
            name = OUTER[module]
        writer.add_tensor(f"{name}.weight", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
