"""Tiny random sentence encoders of every supported family, saved and loaded as folders, without a hub."""

import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

LAYERS, HIDDEN, VOCAB = 4, 32, 100
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,  # layers that do something: a wrong tap is far off
)
DECODER = dict(num_key_value_heads=2, head_dim=8)
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "mpnet": ("mpnet", {}),
    "distilbert": ("distilbert", {"hidden_dim": 48}),
    "modernbert": ("modernbert", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    "nomic-bert": ("nomic_bert", {}),
    "eurobert": ("eurobert", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", DECODER),
    "gemma3": (
        "gemma3_text",
        {**DECODER, "sliding_window": 4, "layer_types": KINDS, "use_bidirectional_attention": True},
    ),
    "gemma3-causal": ("gemma3_text", {**DECODER, "sliding_window": 4, "layer_types": KINDS}),
    "t5": ("t5", {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}),
}
PRE_NORM = {"modernbert", "eurobert", "qwen3", "gemma3", "gemma3-causal", "t5"}
WORDS = [f"w{number}" for number in range(5, VOCAB)]


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word, a first and a last special token, padding on the side asked for."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS]
    raw = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side=side, model_max_length=64, **special)


def save_backbone(family: str, folder: Path, side: str = "right", seed: int = 0) -> Path:
    """A transformers folder with random weights; norms and biases are random too, so that none can be left out."""
    kind, extra = FAMILIES[family]
    base = {k: v for k, v in BASE.items() if kind != "t5" or k in ("vocab_size", "pad_token_id")}
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**{**base, **extra}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    tokenizer(side).save_pretrained(folder)
    return folder


def cut_folder(folder: Path, depth: int) -> None:
    """Make a saved model shallower by its config alone, as a user would by hand; weights beyond it are not loaded."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_hidden_layers", "n_layers", "num_layers"):
        if key in config:
            config[key] = depth
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:depth]
    path.write_text(json.dumps(config))


def sentence_model(folder: Path, pooling: str = "mean", include_prompt: bool = True) -> SentenceTransformer:
    """The saved backbone with a pooling, in eval mode."""
    transformer = Transformer(str(folder))
    pool = Pooling(transformer.get_embedding_dimension(), pooling, include_prompt=include_prompt)
    return SentenceTransformer(modules=[transformer, pool], device="cpu").eval()


def some_texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Texts of random words and lengths."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=rng).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=rng)) for n in lengths]
