"""Every causal-LM family of the installed transformers, tiny and random: served rightly, or refused with a reason?

`python benchmarks/kv_families.py` tries each family in a process of its own and writes docs/families.md. Served means:
at full budget the cache generates the stock model's tokens, padded, in one prompt or in pieces; below it, it runs.
"""

import dataclasses
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# One number for each name that configs give a size by. Those that a config does not know are left out.
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, d_model=64, n_embd=64, dim=64, embed_dim=64, word_embed_proj_dim=64,
    embedding_size=64,
    intermediate_size=96, ffn_dim=96, n_inner=96, d_ff=96, ffn_hidden_size=96, decoder_ffn_dim=96, encoder_ffn_dim=96,
    dff=96, dim_ff=96, shared_intermediate_size=32, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    num_hidden_layers=3, n_layer=3, n_layers=3, decoder_layers=3, encoder_layers=3, num_layers=3,
    num_decoder_layers=3, num_encoder_layers=3,
    num_attention_heads=4, n_head=4, n_heads=4, decoder_attention_heads=4, encoder_attention_heads=4, num_heads=4,
    attention_heads=4, num_key_value_heads=2, head_dim=16, v_head_dim=16, kv_channels=16, d_kv=16,
    max_position_embeddings=512, n_positions=512, seq_length=512, max_seq_len=512, n_ctx=512,
    num_experts=4, num_local_experts=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_topk=2,
    n_group=1, topk_group=1, first_k_dense_replace=1,
    rotary_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.2,
    initializer_range=0.2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
    kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
    mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_n_groups=1, mamba_d_state=16, mamba_expand=2,
    state_size=16, is_decoder=True, use_cache=True,
)  # fmt: skip


def sized(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A tiny config: `SIZES` as far as the class knows them."""
    parts = {name: sized(spec) for name, spec in config_class.sub_configs.items() if spec is not AutoConfig}
    known = {field.name for field in dataclasses.fields(config_class)} | set(
        inspect.signature(config_class.__init__).parameters
    )
    return config_class(**({k: v for k, v in SIZES.items() if k in known} | parts | overrides))


if __name__ == "__main__":
    import sys
    import time

    torch.set_num_threads(1)
    for kind in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        start = time.time()
        try:
            config = sized(CONFIG_MAPPING[kind])
            model = AutoModelForCausalLM.from_config(config)
            n = sum(p.numel() for p in model.parameters())
            print(f"{kind:28} ok {n / 1e6:.1f}M {time.time() - start:.1f}s", flush=True)
        except BaseException as e:
            print(f"{kind:28} {type(e).__name__} {str(e)[:150]!r}", flush=True)
