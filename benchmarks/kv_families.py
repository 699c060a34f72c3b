"""Every causal-LM family of the installed transformers, tiny and random: served rightly, or refused with a reason?

`python benchmarks/kv_families.py` tries each in a process of its own and writes docs/families.md. Served means that a
cache at full budget generates the stock model's tokens and gives its logits, padded, in one piece and in several; that
below it the cache runs; and that the model is as it was after `kv.detach`.
"""

import dataclasses
import inspect
import os
import re
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nestling import kv
from nestling.kv.integration.attach import cached, implementation

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 120  # for a family
# One number for each name by which configs give a size. Those that a config does not know are left out.
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, d_model=64, n_embd=64, dim=64, embed_dim=64, word_embed_proj_dim=64,
    embedding_size=64, intermediate_size=96, ffn_dim=96, n_inner=96, d_ff=96, ffn_hidden_size=96, decoder_ffn_dim=96,
    encoder_ffn_dim=96, dff=96, dim_ff=96, shared_intermediate_size=32, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, num_hidden_layers=4, n_layer=4, n_layers=4, decoder_layers=4, encoder_layers=4,
    num_layers=4, num_decoder_layers=4, num_encoder_layers=4, num_attention_heads=4, n_head=4, n_heads=4,
    decoder_attention_heads=4, encoder_attention_heads=4, num_heads=4, attention_heads=4, num_key_value_heads=2,
    head_dim=16, v_head_dim=16, kv_channels=16, d_kv=16, max_position_embeddings=512, n_positions=512, seq_length=512,
    max_seq_len=512, n_ctx=512, num_experts=4, num_local_experts=4, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, moe_topk=2, n_group=1, topk_group=1, first_k_dense_replace=1, rotary_dim=16, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.2, initializer_range=0.2,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_n_groups=1, mamba_d_state=16,
    mamba_expand=2, state_size=16, is_decoder=True, use_cache=True,
)  # fmt: skip
MLA = dict(num_key_value_heads=4)
# What a few configs need beside, and what makes others tiny.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite",
            "glm_moe_dsa",
        ),
        MLA,
    ),
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, **MLA},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    **dict.fromkeys(
        ("gemma3", "gemma4", "gemma4_unified"),
        {"text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0}},
    ),
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mistral": {"sliding_window": None},
    "gpt_neo": {"attention_types": [[["global"], 4]], "num_layers": 4},
}  # fmt: skip
UNBUILT = {
    "blt": "no small model can be built from its config",
    "cohere_compass_text": "no model can be built from its config",
    "dbrx": "no model can be built from its config",
    "dots3_note": "no small model can be built from its config",
    "fuyu": "no small model can be built from its config",
    "got_ocr2": "no small model can be built from its config",
    "gemma3n": "its vision tower needs timm",
    "lfm2_moe": "no small model can be built from its config",
    "mamba2": "no small model can be built from its config",
    "moss_transcribe_diarize": "no small model can be built from its config",
    "musicgen": "no small model can be built from its config",
    "musicgen_melody": "no small model can be built from its config",
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text", "reformer", "zamba", "zamba2", "zaya"),
        "no small model can be built from its config",
    ),
    "gemma4_assistant": "it drafts for another model and reads that model's cache",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's cache",
}


def sized(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A tiny config: `SIZES` as far as the class knows them, and so in its parts; ``overrides`` of parts are dicts."""
    parts = {
        name: sized(part, **overrides.pop(name, {}))
        for name, part in config_class.sub_configs.items()
        if part is not AutoConfig
    }
    known = {field.name for field in dataclasses.fields(config_class)} | set(
        inspect.signature(config_class.__init__).parameters
    )
    return config_class(**({k: v for k, v in SIZES.items() if k in known} | parts | overrides))


def build(family: str) -> transformers.PreTrainedModel:
    """A random model in eval mode, always the same one."""
    torch.manual_seed(0)
    config = sized(CONFIG_MAPPING[family], **OVERRIDES.get(family, {}))
    return AutoModelForCausalLM.from_config(config).eval()


def verdict(family: str) -> str:
    """``"served"``, or the reason why not; an AssertionError where one of both is not true."""
    model, stock = build(family), build(family)
    ids = torch.randint(3, 90, (8, 64), generator=torch.Generator().manual_seed(0))
    before = implementation(model)
    reason = kv.supports(model)
    assert implementation(model) == before and not model.training
    config = kv.FitConfig(length=64, sensitivity_windows=4, sensitivity_length=32, window=0)
    if reason is not None:
        for refused in (lambda: kv.attach(model), lambda: kv.fit(model, None, ids, config)):
            try:
                refused()
            except kv.UnsupportedModelError as error:
                assert str(error) == reason, f"{error}, and not {reason}"
            else:
                raise AssertionError("it is not refused")
        assert implementation(model) == before
        return reason
    adapter = kv.fit(model, None, ids, config, progress=False)
    assert implementation(model) == before
    mask = (torch.arange(20) >= torch.tensor([0, 7])[:, None]).long()
    arguments = dict(attention_mask=mask, min_new_tokens=8, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = stock.generate(ids[:2, :20] * mask, **arguments)
    full = kv.CacheConfig(budget=1.0, dtype=model.dtype, quantise=False)
    got = model.generate(ids[:2, :20] * mask, **cached(model, kv.NestedCache(model, adapter, full)), **arguments)
    assert torch.equal(got, expected), "it generates other tokens at full budget"
    for cut in (64, 23, 1):
        logits = read(model, ids[:1], kv.NestedCache(model, adapter, replace(full, exact_prompt=False)), cut)
        theirs = read(stock, ids[:1], DynamicCache(config=stock.config), cut)
        assert torch.allclose(logits, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())), (
            f"logits, {cut} at once"
        )
    low = read(model, ids[:1], kv.NestedCache(model, adapter, kv.CacheConfig.paper(0.5)), 16)
    assert torch.isfinite(low).all() and not torch.equal(low, theirs), "nothing changes at half the budget"
    kv.detach(model)
    assert implementation(model) == before
    return "served"


@torch.no_grad()
def read(model, ids: torch.Tensor, cache, cut: int) -> torch.Tensor:
    """Logits of ids ``[1, T]``, so many at once."""
    return torch.cat([model(input_ids=part, **cached(model, cache)).logits for part in ids.split(cut, 1)], 1)


def apart(family: str, seconds: int = SECONDS) -> str:
    """The verdict from a process of its own; what is neither served nor refused starts with ``FAILED``."""
    there, here = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        try:
            text = verdict(family)
        except BaseException as error:
            text = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            traceback.print_exc()
        os.write(here, text.encode())
        os._exit(0)
    os.close(here)
    with open(there, "rb") as file:
        text = file.read().decode()
    _, status = os.waitpid(child, 0)
    return text or f"FAILED: killed by signal {status}"


def without_names(reason: str) -> str:
    """The reason alone, without the model's class or type in front of it, as a cell of a table."""
    return re.sub(r"^(model type '\w+' |\w+(ForCausalLM|LMHeadModel):? )", "", reason).replace("|", "/")


def page(verdicts: dict[str, str]) -> str:
    """The table of the docs."""
    served = sorted(family for family, text in verdicts.items() if text == "served")
    lines = [
        "# Model families",
        "",
        f"Caches of {len(served)} of {len(verdicts)} causal-LM families in transformers {transformers.__version__} "
        "can be nested. `kv.supports(model)` returns None for a supported model, and otherwise the reason.",
        "",
        "`benchmarks/kv_families.py` tests each family with a tiny random model and writes this page. A family is "
        "supported if a cache at full budget reproduces the stock model's tokens and logits (with padding, read at "
        "once and in pieces), a smaller cache works, and `kv.detach` restores the model.",
        "",
        f"## Supported ({len(served)})",
        "",
        f"{', '.join(served)}.",
        "",
        f"## Refused ({len(verdicts) - len(served)})",
        "",
        "The reason is the one that `kv.supports` returns. Families that could not be tested are listed too.",
        "",
        "| families | reason |",
        "| --- | --- |",
    ]
    reasons: dict[str, list[str]] = {}
    for family, text in sorted(verdicts.items()):
        if text != "served":
            reasons.setdefault(without_names(text), []).append(family)
    lines += [f"| {', '.join(families)} | {reason} |" for reason, families in reasons.items()]
    return "\n".join(lines) + "\n"


def main(families: list[str]) -> None:
    verdicts = {}
    for family in families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        start = time.monotonic()
        verdicts[family] = f"not tested: {UNBUILT[family]}" if family in UNBUILT else apart(family)
        print(f"{family:28} {time.monotonic() - start:5.1f} s  {verdicts[family]}", flush=True)
    if not families:
        PAGE.write_text(page(verdicts), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
